"""One HTML file of a run or of a comparison: `make report RUN=runs/droppos/digits-200ep-seed0`. It opens without a network.

run.py         what the page of a run shows (templates/run.html)
comparison.py  what the page of a comparison shows (templates/comparison.html)
encoder.py     what an encoder attends to, the features of its patches, and where predicted positions are right
figures.py     the figures, with matplotlib
page.py        the page, and the figures as SVG files
"""
