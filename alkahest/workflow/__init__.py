"""ComfyUI workflows: a saved graph read as recipes, and an expression written as a graph."""
