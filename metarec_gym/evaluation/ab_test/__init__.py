"""A/B tests of selection policies.

`assignment` says who meets which policy, `table` holds what was logged, `planning` says beforehand what can be found,
`analysis` says afterwards what was found, `sequential` while the test runs; `interleaving` compares two policies inside one
slate, `playing` runs tests in a world, `page` writes the report. `estimates` is the arithmetic that planning, monitoring and
the coverage study share; the analysis itself is done by the library tea-tasting, and a test holds both equal.
"""
