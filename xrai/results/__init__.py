"""From scores to what people look at: metrics, plots, the report and the artifacts of a run."""
