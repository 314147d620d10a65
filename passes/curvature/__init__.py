"""How each weight's gradient is made, read off the joint graph, and its curvature made the same way."""
