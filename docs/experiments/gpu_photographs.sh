#!/usr/bin/env bash
# experiments/photographs.sh on one GPU: a teacher of 193 M parameters in place of 1.3 M, and in minutes.
#   docs/experiments/gpu_photographs.sh cifar10_train.zip             a piece of at most 9 minutes; the same command goes on -> runs/photographs-gpu
#   ARM=labels docs/experiments/gpu_photographs.sh cifar10_train.zip  an encoder trained on the labels -> runs/photographs-gpu-labels
#   SHARE=50 ...    half of the steps, where there is less time; MINUTES=5 ...: shorter pieces; OUT=FOLDER ...: small.tgz goes there
#   TINY=2 ...      two steps a stage, small networks: do the commands run?
# Status 75: the piece is over, something is left. seconds.txt says what is done; small.tgz holds all that is worth keeping.
set -euo pipefail
cd "$(dirname "$0")/../.."
ARM=${ARM:-random} MINUTES=${MINUTES:-9} SHARE=${SHARE:-100} RUN=runs/photographs-gpu DATA=runs/photographs
docs/experiments/photographs.sh "$1" split                 # -> train.zip, held-out.zip
source tests/setup.sh tests/requirements.txt
# The preset: of an image's 64 tokens, F is 23 GFLOP at S and 0.13 at mini. A step of 256 rows, 3 F, is then 18 TFLOP, 60 ms at 30% of an
# H200's peak (XL reaches 43%, docs/COST.md): 6,000 steps take six minutes and see each photograph 85 times. mini's 0.1 TFLOP would take
# less than launching its 700 operations; B would take 1.4 times as long.
PRESET=DiTDH-S ROWS=256 SAMPLES=5000 COMPILE=--compile
case $ARM in
    random) ENCODER="random_encoder.py --width 48" ;;
    labels) RUN=$RUN-labels ENCODER="train_encoder.py --data-path $DATA/train.zip --flips --width 96 --depth 6" ;;
    *) echo "ARM=$ARM: it is random or labels" >&2; exit 2 ;;
esac
[ -z "${TINY:-}" ] || RUN=$RUN-tiny PRESET=DiTDH-mini ROWS=16 SAMPLES=20 COMPILE=
END=$((SECONDS + MINUTES * 60))
mkdir -p "$RUN"
touch "$RUN/seconds.txt"
trap 'tar -C "$RUN" -czf "${OUT:-$RUN}/small.tgz" $(cd "$RUN" && find . -size -4000k -regex ".*\.\(jsonl?\|md\|png\|txt\)" -not -path "*/.*/*")' EXIT

stage() {   # NAME COMMAND...: run it and note its seconds, unless it is done; at the end of the piece, stop it, which saves
    local name=$1 start=$SECONDS status=0
    shift
    ! grep -q "^$name " "$RUN/seconds.txt" || return 0
    printf '\n== %s\n$ %s\n' "$name" "$*"
    if [ $SECONDS -lt $END ]; then
        timeout --foreground --kill-after 60 $((END - SECONDS)) "$@" || status=$?
    else
        status=124
    fi
    if [ $status = 124 ]; then
        echo "$MINUTES minutes are over in $name: the same command goes on"
        exit 75
    fi
    [ $status = 0 ] || exit $status
    echo "$name $((SECONDS - start))" >> "$RUN/seconds.txt"
}

steps() { echo "--steps ${TINY:-$(($1 * SHARE / 100))}"; }

# A state of S is 3 GB: only the last one is saved.
COMMON="--seed 0 --batch-size $ROWS --micro-batch $ROWS --precision bf16 $COMPILE --log-every 100 --save-every 1000000 --keep 1"
[ "$ARM" = random ] || ENCODER="$ENCODER --batch-size $ROWS $(steps 3000)"
stage encoder "$PYTHON" sanity/$ENCODER --out "$RUN/encoder" --patch 4
stage encode "$PYTHON" encode_latents.py --data-path $DATA/train.zip --out "$RUN/latents" --image-size 32 --encoder-size 32 --batch-size 512 \
    --flips --encoder "$RUN/encoder"
stage decoder "$PYTHON" sanity/train_decoder.py --data-path $DATA/train.zip --latents "$RUN/latents" --out "$RUN/decoder" --noise 0.5 \
    $(steps 3000) --batch-size $ROWS
stage teacher "$PYTHON" train_teacher.py --latents "$RUN/latents" --out "$RUN/teacher" --preset $PRESET --time-shift 2 \
    $(steps 6000) --lr 3e-4 --lr-final 1e-5 --decay-from 0.4 --ema 0.999 $COMMON
stage CMT "$PYTHON" train_cmt.py --teacher "$RUN/teacher" --out "$RUN/cmt" \
    $(steps 800) --pairs 16 --lr 1.5e-4 --lr-final 1e-5 --ema 0.995 $COMMON
WEIGHT="--loss-form mean --loss-power 0.5 --loss-eps 0.1"
stage MFD "$PYTHON" train_meanflow.py --latents "$RUN/latents" --teacher "$RUN/teacher" --init "$RUN/cmt" --out "$RUN/mfd" \
    $(steps 2400) --lr 1e-4 --lr-final 1e-5 --decay-from 0.3 --ema 0.998 $WEIGHT $COMMON
stage MFT "$PYTHON" train_meanflow.py --latents "$RUN/latents" --eta 0 --init "$RUN/mfd" --out "$RUN/mft" \
    $(steps 200) --lr 1e-5 --lr-final 2e-6 --ema 0.99 $WEIGHT $COMMON

COLUMNS=()
for sample in "teacher 50" "teacher 1" "CMT 1" "MFD 1" "MFD 2" "MFT 1" "teacher 100 heun"; do
    read -r name nfe solver <<< "${sample,,}"
    file=$RUN/samples/${name}_$nfe.npz
    stage "sample $sample" "$PYTHON" sample.py "$RUN/$name" --decoder "$RUN/decoder" --nfe "$nfe" --solver "${solver:-euler}" \
        --num-samples $SAMPLES --batch-size 1000 --precision bf16 --out "$file"
    COLUMNS+=("$sample=$file")
done
stage report "$PYTHON" sanity/report.py --run "$RUN" --data $DATA/train.zip --held-out $DATA/held-out.zip --samples "${COLUMNS[@]}" \
    --classifier-steps "${TINY:-1500}"
