"""TRL's own SFT script (trl/scripts/sft.py), without what it does around training."""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from meristem import continual
from meristem.methods import EWC, ExperienceReplay

parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()

dataset = load_dataset(script_args.dataset_name)

trainer = continual(SFTTrainer, methods=[ExperienceReplay(ratio=0.1), EWC(strength=1000)])(
    model=model_args.model_name_or_path,
    args=training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    peft_config=get_peft_config(model_args),
    history={"earlier": load_dataset("json", data_files="earlier.jsonl", split="train")},
)
trainer.train()
trainer.save_model(training_args.output_dir)
