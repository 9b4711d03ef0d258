"""How often the statistics are right: a simulation of data sets with a known truth.

A data set is drawn with the correlations that real data have, `harness.record.stats` makes an interval or a decision of
it, and the simulation counts how often that is right. `populations` takes from the committed records what data sets are
drawn from, `scenarios` draws them and counts, and `page` writes the tables and the figure of reports/statistics from
the counts alone.

    python -m studies.simulation -h
"""
