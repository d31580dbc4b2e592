"""Training and evaluation of the forecasts; the only place here that knows the model."""
