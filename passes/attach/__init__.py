"""How a forward graph uses its weights, and the node that is put after each."""
