"""Is it better, and how sure: rollouts, headroom, closed gaps, intervals, verdict, report."""
