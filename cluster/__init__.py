"""How the model is reached and served: wire types, clients, scheduler, engine, Ray Serve."""
