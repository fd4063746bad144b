//! The examples at the end of each command's help.

/// The command, then what each example does and what to type.
pub(super) const EXAMPLES: &[(&str, &[(&str, &str)])] = &[
    (
        "train",
        &[
            ("the demo: draws its own pictures", "vitrum train"),
            ("a recipe on pictures in class folders", "vitrum train mini/cifar10 --data photos --epochs 20"),
            ("what a run would need, without training", "vitrum train b16/imagenet21k --dry-run"),
            ("three learning rates, one after the other", "vitrum train --sweep optim.lr=3e-4,1e-3,3e-3"),
            ("continue a run that was stopped", "vitrum train --resume runs/demo"),
        ],
    ),
    (
        "finetune",
        &[
            ("your pictures, with settings that fit most", "vitrum finetune --weights FILE --data photos"),
            (
                "only a new head",
                "vitrum finetune --weights FILE --data photos --set optim.freeze_backbone=true",
            ),
            ("a published transfer", "vitrum finetune b16/cifar10 --weights ViT-B_16.npz --data cifar10"),
        ],
    ),
    (
        "eval",
        &[
            ("a run's best checkpoint on its data", "vitrum eval --weights runs/demo --data demo"),
            ("with the accuracy of every class", "vitrum eval --weights FILE --data photos --per-class"),
            ("prepared as timm does", "vitrum eval --weights FILE --data photos --protocol timm"),
        ],
    ),
    (
        "predict",
        &[
            ("one picture", "vitrum predict --weights runs/demo cat.jpg"),
            ("a folder, for a script", "vitrum predict --weights FILE photos --top 1 --json"),
            (
                "a table, and pictures with their answers",
                "vitrum predict --weights FILE photos --csv --save answers",
            ),
            ("only answers above a half", "vitrum predict --weights FILE photos --threshold 0.5"),
        ],
    ),
    (
        "features",
        &[("a file that NumPy opens", "vitrum features --weights FILE --data photos --out features.npz")],
    ),
    (
        "probe",
        &[
            ("a linear probe", "vitrum probe --weights FILE --data photos"),
            ("nearest neighbours", "vitrum probe --weights FILE --data photos --method knn"),
        ],
    ),
    (
        "pack",
        &[
            ("class folders into shards", "vitrum pack photos packed"),
            ("smaller pictures", "vitrum pack photos packed --size 256"),
            ("check what was packed", "vitrum pack packed --check"),
        ],
    ),
    ("preview", &[("what the model will see", "vitrum preview mini/cifar10 --data photos --out sheet.png")]),
    (
        "convert",
        &[
            ("a run for timm", "vitrum convert runs/demo model.safetensors --to timm"),
            ("to the layout of vit_jax", "vitrum convert FILE model.npz"),
        ],
    ),
    (
        "inspect",
        &[
            ("a weights file", "vitrum inspect model.safetensors"),
            ("a run's newest checkpoint", "vitrum inspect runs/demo/checkpoints/last"),
        ],
    ),
    (
        "grad",
        &[(
            "for comparison with another program",
            "vitrum grad --weights FILE --batch batch.safetensors --out grads.safetensors",
        )],
    ),
    (
        "replay",
        &[(
            "for comparison with another program",
            "vitrum replay --weights FILE --batches batches.safetensors --out trajectory.safetensors --set optim.lr=0.01",
        )],
    ),
    (
        "plan",
        &[
            ("a recipe on this machine", "vitrum plan b16/imagenet21k"),
            ("with a smaller batch", "vitrum plan b16/imagenet21k --set train.batch=1024"),
        ],
    ),
    (
        "bench",
        &[
            ("training steps of a small model", "vitrum bench --model Ti/16"),
            ("time by operation", "vitrum bench --model B/16 --profile"),
            ("how fast pictures load", "vitrum bench --what data --data photos"),
        ],
    ),
    (
        "selftest",
        &[
            ("the CPU", "vitrum selftest --device cpu"),
            ("one group of operations", "vitrum selftest --filter attention"),
        ],
    ),
    ("doctor", &[("for a bug report", "vitrum doctor")]),
    (
        "report",
        &[
            ("make a run's page again", "vitrum report runs/demo"),
            ("compare two runs", "vitrum report runs/a runs/b --out comparison.html"),
        ],
    ),
    ("settings", &[("one key", "vitrum settings optim.lr"), ("a section", "vitrum settings augment")]),
    (
        "recipes",
        &[
            ("what there is", "vitrum recipes"),
            ("a start for your own", "vitrum recipes show mini/cifar10 > mine.toml"),
        ],
    ),
    ("completions", &[("for this bash", "source <(vitrum completions bash)")]),
    ("man", &[("where `man` finds them", "vitrum man ~/.local/share/man/man1")]),
];

/// The examples of a command, as its help shows them.
pub(super) fn text(command: &str) -> Option<String> {
    let (_, examples) = EXAMPLES.iter().find(|(name, _)| *name == command)?;
    let lines: String = examples.iter().map(|(what, line)| format!("  # {what}\n  {line}\n")).collect();
    Some(format!("Examples:\n{}", lines.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_examples_and_each_can_be_typed() {
        let command = super::super::command();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            assert!(text(sub.get_name()).is_some(), "`vitrum {}` has no examples", sub.get_name());
        }
        for (name, examples) in EXAMPLES {
            for (_, line) in *examples {
                let typed = line.trim_start_matches("source <(").trim_end_matches(')');
                let words = typed.split(" > ").next().unwrap().split_whitespace();
                assert!(typed.starts_with(&format!("vitrum {name}")), "{line}");
                command.clone().try_get_matches_from(words).unwrap_or_else(|e| panic!("`{line}`: {e}"));
            }
        }
    }
}
