"""What a policy would have earned, from a log of what another one did: estimators, their intervals, and when to believe them.

bandit_log      BanditLog: one request a row; from arrays, an InteractionLog, a ReplayTable
cross_fitting   reward models and estimated propensities, never fitted on the users they are used for
terms           Terms: what every estimator returns; value, influence, sums over users
single_action   IPS, SNIPS, DM, DR, SNDR, Switch-DR, DRos, SG-DR, MIPS
slates          SIPS, IIPS, RIPS, cascade-DR
sequences       PDIS, WPDIS, sequential DR, fitted-Q evaluation
intervals       over users: t, bootstrap, empirical Bernstein
tuning          SLOPE
diagnostics     effective rows, largest weight, overlap
selection       rank correlation, regret@k, SharpeRatio@k
evaluation      everything at once for a log and a few policies
"""
