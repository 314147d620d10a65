"""The experiments of the papers that lotion_fx is built on, each with one report that a browser opens from disk."""
