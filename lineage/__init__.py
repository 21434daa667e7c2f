"""How RWKV-6 came to be: RWKV-2, 3, 4 and 5, each a file that needs none of the others."""
