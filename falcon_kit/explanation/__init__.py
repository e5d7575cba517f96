"""`explain()`: a text on its way through Falcon to the next token, as an interactive view.

The files, in the order of their imports:

record.py  the values of one layer, taken by forward hooks
route.py   the tokens that a prediction depends on, followed back from layer to layer
parts.py   what the view shows, as JSON
view.py    Explanation: the widget, and the page without a kernel
"""
