#!/usr/bin/env bash
# Neural-Solver-Library's own run.py on elasticity, with its own arguments, patched.
#
#   recipes/neural_solver/elasticity.sh CHECKOUT DATA [MORE ARGUMENTS OF run.py]
#
# CHECKOUT is one of github.com/thuml/Neural-Solver-Library, whose requirements are installed, and besides them
# kappamodules. DATA is what holds elasticity/Meshes, real or made: where it is missing, 1200 plates are solved first,
# which takes some minutes. FLASHBIAS_DISABLE=1 runs the stock code, which needs a GPU; FLASHBIAS_VERIFY=first compares
# the first call of each layer. On a CPU choose a small case, for example
#
#   recipes/neural_solver/elasticity.sh CHECKOUT DATA --ntrain 20 --ntest 5 --epochs 2 --n_layers 2
#
# Hardware: any GPU. The stock arguments are 500 epochs of 1000 samples, one at a time: hours.
set -euo pipefail

checkout=$(realpath "${1:?a checkout of Neural-Solver-Library}")
mkdir -p "${2:?a folder for the data}"
data=$(realpath "$2")
shift 2

python -m flashbias.recipes neural-solver checkout "$checkout"
[ -e "$data/elasticity/Meshes" ] || python -m flashbias.recipes neural-solver elasticity-data "$data"
cd "$checkout"
exec python -m flashbias.recipes run --patch neural_solver -- run.py \
    --data_path "$data" --loader elas --geotype unstructured --scheduler CosineAnnealingLR \
    --space_dim 2 --fun_dim 0 --out_dim 1 --normalize 1 --model Transformer_Spatial_Bias \
    --n_hidden 128 --n_heads 8 --n_layers 8 --slice_num 64 --unified_pos 0 --ref 8 \
    --batch-size 1 --epochs 500 --eval 0 --save_name elas_Transformer_Spatial_Bias "$@"
