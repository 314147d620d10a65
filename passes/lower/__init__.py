"""What a graph's device does better in a kernel of ours."""
