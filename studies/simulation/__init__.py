"""A simulation of the statistics: data sets with a known truth and the correlations that real ones have, what
`harness.record.stats` makes of each, and how often it is right. `python -m studies.simulation -h`.

`populations` takes from the committed records what data sets are drawn from, `scenarios` draws them and counts, and
`page` writes the tables and the figure of reports/statistics from the counts alone.
"""
