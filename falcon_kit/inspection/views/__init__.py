"""Values in, self-contained escaped HTML out.

tables.py     HTML tables
walk.py       a text whose tokens react to the pointer and the arrow keys
attention.py  attention maps linked to the text
lens.py       predictions, surprisal and the logit lens
tokens.py     tokens byte by byte, token counts of several texts
"""
