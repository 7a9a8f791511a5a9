"""Measures of policies and the report that shows them: diversity, win rates, charts, health, report."""
