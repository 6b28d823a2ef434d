"""Terms become numbers become bytes: one pass, block by block, in bounded memory."""
