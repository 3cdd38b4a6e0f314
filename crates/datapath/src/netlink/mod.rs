//! Interfaces, addresses, routes and neighbours of the node and of pods.
