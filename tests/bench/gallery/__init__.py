"""Real small trainings, healthy and with a fault planted, with the harm of each fault measured against its twin."""
