"""MGLD-VSR (arXiv 2312.00853): networks, schedule, sampler and the pipeline of a whole clip."""
