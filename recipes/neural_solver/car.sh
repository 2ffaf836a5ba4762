#!/usr/bin/env bash
# Neural-Solver-Library's own run.py on car design, with its own arguments, patched.
#
#   recipes/neural_solver/car.sh CHECKOUT DATA [MORE ARGUMENTS OF run.py]
#
# CHECKOUT is one of github.com/thuml/Neural-Solver-Library, whose requirements are installed (for the loader's graphs
# torch-cluster, or the pyg-lib that newer versions of torch_geometric want), and besides them kappamodules. DATA holds
# training_data, or preprocessed_data too; where it is missing, 18 car-like bodies with a made-up flow are put there.
# FLASHBIAS_DISABLE=1 runs the stock code.
#
# After training, run.py computes drag coefficients from files below /data/PDE_data/mlcfd_data, whatever DATA is: with
# other data that last step fails, after the checkpoint has been written.
#
# Hardware: one GPU, 200 epochs of 789 bodies: hours on an H200.
set -euo pipefail

checkout=$(realpath "${1:?a checkout of Neural-Solver-Library}")
mkdir -p "${2:?a folder for the data}"
data=$(realpath "$2")
shift 2

python -m flashbias.recipes neural-solver checkout "$checkout"
[ -e "$data/training_data" ] || python -m flashbias.recipes neural-solver car-data "$data"
cd "$checkout"
exec python -m flashbias.recipes run --patch neural_solver -- run.py \
    --data_path "$data" --loader car_design --geotype unstructured --task steady_design \
    --space_dim 3 --fun_dim 7 --out_dim 4 --model Transformer_Spatial_Bias \
    --n_hidden 128 --n_heads 8 --n_layers 8 --mlp_ratio 2 --slice_num 32 --unified_pos 0 --ref 8 \
    --batch-size 1 --epochs 200 --eval 0 --save_name car_design_Transformer_Spatial_Bias "$@"
