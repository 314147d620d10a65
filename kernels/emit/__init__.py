"""What Inductor emits for a GPU that is not there. The top floor: it knows the runtime."""
