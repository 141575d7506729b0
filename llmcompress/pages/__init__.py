"""Pages for a browser: ``report.html`` of one result and the comparison of several. Each is one file that asks for
nothing else: style and pictures are inside, and nothing in it runs."""
