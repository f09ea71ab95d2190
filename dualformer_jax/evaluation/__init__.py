"""Scoring of dataset splits, metrics, and reports."""
