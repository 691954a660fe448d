"""The words of the page, explained."""

WORDS = {
    "sink": "A token at the front of every stream that attention can rest on. A sink model was trained with "
    "a placeholder that means nothing else; a vanilla model may come to use its first tokens so.",
    "null slot": "A place in attention that no token holds, which some kinds of model are trained with. "
    "Every token sees it under every layout, and it takes none of N.",
    "null mass": "The mean attention that no token gets: what the null slot takes. A model without one has "
    "none; where it is marked *, a proxy stands there.",
    "layout": "What a stream keeps: 1+127 is 1 sink slot that is never reused and a window of 127. N is the "
    "sum, the length of the cache.",
    "window": "The newest other tokens kept, the current one included. Older ones are evicted.",
    "streaming": "Tokens come one by one without end, and only a layout's worth of them is kept.",
    "dense": "Nothing is evicted: every token sees all before it.",
    "recompute": "For every token the last N are computed anew, a sink model's sink in front of them: the "
    "paper's strong and slow baseline.",
    "nats": "The unit of loss, the mean of -ln(probability given to the token that came). "
    "One nat is 1.44 bits; 0.01 nats are about one per cent of perplexity.",
    "stream position": "How many tokens, sinks included, came before this one in the stream.",
    "95% interval": "Over text: from a bootstrap over blocks of neighbouring tokens; figures from as much "
    "other text of this kind would fall there about 95 times in 100. Over seeds: from the "
    "differences of the seeds, by Student's t.",
    "importance": "The mean attention that a position gets from those that can see it.",
    "sink metric": "The share of heads, over all layers, in which a position's importance exceeds a bound.",
    "initial weights": "The same network before any training: what a figure shows when nothing was learnt.",
    "kurtosis": "How heavy the tails of a layer's activations are; 3 for a normal distribution.",
    "chance": "The accuracy of a guess that knows only the form of the answer.",
}
