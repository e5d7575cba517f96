"""Values in, matplotlib figures out.

labels.py     tokens as labels, the type of values
attention.py  statistics of all heads, one attention map, head similarity
lens.py       the logit lens, logit contributions, surprisal, attribution
tokens.py     bytes of each token, token counts of several texts

Colours are viridis and cividis, or the palette of `falcon_kit.display.figure`.
"""
