"""How well `CrashPrediction` foresees real divergences, and what its model was fitted on."""
