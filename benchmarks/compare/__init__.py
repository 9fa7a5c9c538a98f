"""Compare all methods with one encoder, one budget and one set of evaluations, over seeds: `make compare`. See README.md in this folder.

arena.py  what the methods of a comparison share, and which methods take part
units.py  one method and seed: pre-training and all evaluations, as a process of its own; many of them side by side
scores.py the ledger of an arena
table.py  the tables
"""
