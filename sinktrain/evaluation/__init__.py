"""From streams to measurements: losses under streaming, and how sure they are."""
