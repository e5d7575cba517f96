"""Facts about the Falcon family: shapes, names, the model card, bytes in closed form."""
