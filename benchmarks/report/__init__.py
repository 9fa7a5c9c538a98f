"""One HTML file of a run or of a comparison: `make report RUN=runs/droppos/digits-200ep-seed0`. It opens without a network.

run.py         the sections of a run's page
comparison.py  the sections of a comparison's page
encoder.py     what an encoder attends to, the features of its patches, and where predicted positions are right
figures.py     the figures, with matplotlib
page.py        sections to a page; the figures also become SVG files
"""
