"""Web pages over the fleet: machines, alerts, rollouts, drift, downtime ledger, audit log."""
