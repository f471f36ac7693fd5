"""From a case to data, a trained surrogate, its evaluation and a report."""
