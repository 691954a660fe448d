"""From measurements to what people read: tables, pictures, one page."""
