configs = {
    "triangle_attention": "cuequivariance",
    "triangle_multiplicative": "cuequivariance",
    "skip_amp": {"sample_diffusion": True, "confidence_head": True},
    "infer_setting": {"chunk_size": None, "chunk_size_thresholds": {"1024": -1, "1536": 512}},
    "sample_diffusion": {"N_sample": 5, "N_step": 200},
    "model": {
        "N_cycle": 10,
        "pairformer": {"n_blocks": 3},
        "msa_module": {"n_blocks": 0},
        "template_embedder": {"n_blocks": 0},
        "confidence_head": {"n_blocks": 0},
        "diffusion_module": {"transformer": {"n_blocks": 3}},
    },
}
