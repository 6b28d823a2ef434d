"""How the miniature family is grown."""
