"""The ground floor: configs, parameter trees, meshes and axis names, weights, metrics. Imports nothing of ours."""
