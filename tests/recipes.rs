//! Recipes: the built-in ones, files, and `--set`, with the messages for wrong ones.

use std::fs;
use std::path::PathBuf;

use vitrum::error::{Error, Kind, Result};
use vitrum::recipe::{BUILT_IN, ClassWeights, Crop, Duration, OptimName, Recipe, Size};
use vitrum::vit::config::PoolKind;

fn load(name: &str, set: &[&str]) -> Result<Recipe> {
    let overrides: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    Recipe::read(Some(name), &overrides).map(|loaded| loaded.recipe)
}

fn demo(set: &[&str]) -> Recipe {
    load("demo", set).unwrap()
}

/// The usage error of the demo with these overrides: message and hint.
fn refused(set: &[&str]) -> (String, String) {
    usage(load("demo", set).unwrap_err())
}

/// The usage error of a recipe file with this text, without the leading file name.
fn refused_file(text: &str) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("my.toml");
    fs::write(&path, text).unwrap();
    let (message, hint) = usage(load(path.to_str().unwrap(), &[]).unwrap_err());
    let message = message.strip_prefix(path.to_str().unwrap()).expect("the message names the file");
    (message.to_string(), hint)
}

fn usage(error: Error) -> (String, String) {
    assert_eq!(error.kind(), Kind::Usage, "{error}");
    (error.message().into(), error.hint_text().unwrap_or_default().into())
}

#[test]
fn every_recipe_in_the_folder_is_built_in_and_explains_itself() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut found = 0;
    for entry in walk(&folder) {
        let name = entry.strip_prefix(&folder).unwrap().with_extension("").display().to_string();
        let text = fs::read_to_string(&entry).unwrap();
        assert!(BUILT_IN.contains(&(name.as_str(), text.as_str())), "`{name}` is not built in");
        for word in ["# Source", "# Expect", "# Cost", "# Run", "# Differs"] {
            assert!(text.contains(word), "`{name}` lacks the header line `{word}`");
        }
        let recipe = load(&name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let command = if recipe.finetune.is_some() { "finetune" } else { "train" };
        let is_default = name == "demo" || name == "finetune";
        assert!(text.contains(&format!("vitrum {command} {name}")) || is_default, "`{name}`: no command");
        found += 1;
    }
    assert_eq!(found, BUILT_IN.len());
}

fn walk(folder: &std::path::Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn a_written_recipe_reads_back_as_the_same_recipe() {
    let overrides = [
        "schedule.warmup=2.5 epochs",
        "schedule.total=1000000 examples",
        "schedule.cooldown=3%",
        "model.image=32x64",
        "model.patch=8x16",
        "optim.groups=[{pattern='head[.].*', lr_mult=3.0, frozen=true, schedule={kind='linear', warmup='5%'}}]",
        "optim.beta2=0.98",
        "augment.hue=0.1",
        "optim.lr=0.1",
        "data.train=a \"quoted\" \\ folder",
    ];
    for (name, _) in BUILT_IN {
        for set in [&overrides[..], &[]] {
            let recipe = load(name, set).unwrap();
            let text = recipe.to_toml();
            assert_eq!(Recipe::from_toml(&text, "recipe.toml").unwrap(), recipe, "{text}");
        }
    }
    let text = demo(&["augment.hue=0.1"]).to_toml();
    assert!(text.contains("hue = 0.1\n"), "an f32 is written as the user wrote it: {text}");
    assert!(text.contains("max_skipped = 3\n"), "defaults are spelled out: {text}");
}

#[test]
fn a_resolved_recipe_says_every_size_and_still_describes_the_same_run() {
    let recipe = load("b16/imagenet21k", &[]).unwrap();
    let resolved = recipe.resolved(0, 14_197_122).unwrap();
    assert_eq!((resolved.model.width, resolved.model.mlp), (Some(768), Some(3072)));
    assert_eq!(resolved.model_config(0).unwrap(), recipe.model_config(0).unwrap());
    let again = Recipe::from_toml(&resolved.to_toml(), "recipe.toml").unwrap();
    assert_eq!(again, resolved);

    let epochs = demo(&["train.epochs=2"]).resolved(10, 20_000).unwrap();
    assert_eq!((epochs.train.steps, epochs.train.epochs), (Some(625), None));
}

#[test]
fn the_pre_training_recipe_has_the_published_numbers() {
    let recipe = load("b16/imagenet21k", &[]).unwrap();
    assert_eq!((recipe.train.batch, recipe.train.steps), (4096, Some(300_000)));
    assert_eq!(recipe.schedule.warmup, Duration::Steps(10_000));
    assert_eq!((recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.clip), (1e-3, 0.1, 1.0));
    let model = recipe.model_config(0).unwrap();
    assert_eq!((model.width, model.depth, model.heads, model.mlp, model.tokens()), (768, 12, 12, 3072, 197));
    assert_eq!((model.classes, model.head_bias, recipe.data.train), (21_843, -10.0, None));
}

#[test]
fn set_takes_a_value_as_its_key_wants_it() {
    let recipe = demo(&[
        "train.batch=64",
        "optim.lr=3",
        "optim.clip=.5",
        "optim.name=lion",
        "model.image=64x32",
        "augment.flip=false",
        "augment.area=[0.2, 1]",
        "augment.crop=torch",
        "data.train=1000",
        "model.pool=\"token\"",
        "model.posemb=learned",
        " train.seed = 7 ",
        "schedule.warmup=100_000 examples",
    ]);
    assert_eq!((recipe.train.batch, recipe.train.seed), (64, 7));
    assert_eq!((recipe.optim.lr, recipe.optim.clip, recipe.optim.name), (3.0, 0.5, OptimName::Lion));
    assert_eq!(recipe.model.image, Size { height: 64, width: 32 });
    assert_eq!(
        (recipe.augment.flip, recipe.augment.area, recipe.augment.crop),
        (false, (0.2, 1.0), Crop::Torch)
    );
    assert_eq!(recipe.data.train.as_deref(), Some("1000"), "a folder may have a number for a name");
    assert_eq!(recipe.model.pool, PoolKind::Token);
    assert_eq!(recipe.schedule.warmup, Duration::Examples(100_000));
}

#[test]
fn the_seeds_names_are_accepted_and_replace_ours() {
    let recipe = demo(&["model.num_heads=8", "model.hidden_size=64", "model.dropout_rate=0.1"]);
    assert_eq!((recipe.model.heads, recipe.model.width, recipe.model.dropout), (Some(8), Some(64), 0.1));
    let (message, _) = refused_file("[model]\nheads = 4\nnum_heads = 8\n");
    assert!(message.starts_with(", line 3, column 1: `model.heads` is given twice"), "{message}");
}

#[test]
fn the_later_of_steps_and_epochs_decides() {
    let recipe = demo(&["train.epochs=2.5"]);
    assert_eq!((recipe.train.steps, recipe.train.epochs), (None, Some(2.5)));
    assert_eq!(recipe.steps(20_000).unwrap(), 781);
    let recipe = demo(&["train.epochs=2.5", "train.steps=60"]);
    assert_eq!((recipe.train.steps, recipe.train.epochs), (Some(60), None));
    assert_eq!(demo(&["train.epochs=0.001"]).steps(100).unwrap(), 1, "a run has at least one step");
    let (message, _) = refused_file("[model]\nvariant = \"Ti/16\"\n[train]\nsteps = 5\nepochs = 1.0\n");
    assert!(
        message.starts_with(", line 4, column 9: `train.steps` and `train.epochs` are both set"),
        "{message}"
    );
}

#[test]
fn a_shorter_run_shortens_the_recipes_warmup_but_not_the_users() {
    let read = |set: &[&str]| {
        let overrides: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        Recipe::read(Some("b16/imagenet21k"), &overrides)
    };
    let loaded = read(&["train.steps=600"]).unwrap();
    assert_eq!(loaded.recipe.schedule.warmup, Duration::Steps(20));
    assert_eq!(loaded.notes, ["warm-up shortened from 10000 to 20 steps, to fit a run of 600"]);

    let loaded = read(&["train.steps=20000"]).unwrap();
    assert_eq!((loaded.recipe.schedule.warmup, loaded.notes.len()), (Duration::Steps(10_000), 0));

    for steps in 1..40 {
        let recipe = demo(&[&format!("train.steps={steps}")]);
        assert!(recipe.schedule.warmup.to_steps(steps, 128, 20_000) < steps.max(1), "{steps} steps");
    }

    let error = read(&["train.steps=600", "schedule.warmup=1000"]).unwrap_err();
    assert_eq!(error.message(), "`schedule.warmup` is 1000 steps, but the run has only 600");
    assert_eq!(
        error.hint_text(),
        Some("shorten it, as in `--set schedule.warmup=10%`, or raise `train.steps`")
    );
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_known_one() {
    for (set, key, meant) in [
        ("train.stpes=60", "train.stpes", "train.steps"),
        ("train.lr=0.1", "train.lr", "optim.lr"),
        ("trian.steps=60", "trian.steps", "train.steps"),
        ("model.poool=gap", "model.poool", "model.pool"),
        ("optim.groups=[{patern='x'}]", "optim.groups[0].patern", "optim.groups[0].pattern"),
    ] {
        let (message, hint) = refused(&[set]);
        assert_eq!(message, format!("unknown key `{key}`"));
        assert_eq!(hint, format!("did you mean `{meant}`?"));
    }
    let (_, hint) = refused(&["qqq=1"]);
    assert_eq!(
        hint,
        "the sections are `model`, `data`, `augment`, `optim`, `schedule`, `loss`, `train`, `eval`, `finetune`, \
         `weights`"
    );
    let (_, hint) = refused(&["loss.zzzzzzz=1"]);
    assert_eq!(hint, "the keys of `loss` are `kind`, `label_smoothing`, `class_weights`");
}

#[test]
fn wrong_types_name_key_expected_and_got() {
    for (set, expected) in [
        ("train.steps=many", "`train.steps` is the text `many`, expected a whole number from 0 up"),
        ("train.steps=-1", "`train.steps` is -1, expected a whole number from 0 up"),
        ("train.steps=1.5", "`train.steps` is 1.5, expected a whole number from 0 up"),
        ("optim.lr=fast", "`optim.lr` is the text `fast`, expected a number"),
        ("augment.flip=1", "`augment.flip` is 1, expected `true` or `false`"),
        ("augment.area=0.5", "`augment.area` is 0.5, expected a list of two numbers"),
        ("optim.groups=head", "`optim.groups` is the text `head`, expected a list"),
        (
            "model.image=32by32",
            "`model.image` is the text `32by32`, expected pixels, as in 224 or \"224x160\" (height x width)",
        ),
    ] {
        assert_eq!(refused(&[set]).0, expected);
    }
    assert!(refused(&["schedule.warmup=5 weeks"]).0.starts_with("`schedule.warmup` is the text `5 weeks`"));
}

#[test]
fn enums_list_their_alternatives() {
    let (message, hint) = refused(&["optim.name=adamx"]);
    assert_eq!(message, "`optim.name` cannot be `adamx`");
    assert!(hint.ends_with("use one of `sgd`, `adam`, `adamw`, `lion`, `adafactor`"), "{hint}");
    let (message, hint) = refused(&["loss.kind=7"]);
    assert_eq!(message, "`loss.kind` cannot be 7");
    assert_eq!(hint, "use one of `softmax`, `sigmoid`");
}

#[test]
fn a_malformed_set_says_how_to_write_it() {
    for set in ["train.steps", "train.steps=", "=5", "train=5", "train.steps.more=5", "train..steps=5", ""] {
        let (message, hint) = refused(&[set]);
        assert!(!message.is_empty() && !hint.is_empty(), "{set}");
    }
    assert_eq!(refused(&["data.train=\"a\"\nb=1", "train.batch=0"]).0, "`train.batch` is 0");
}

#[test]
fn a_file_shows_the_line_at_fault() {
    let (message, hint) = refused_file("# mine\n[train]\nbatch = 64\n  stpes = 60 # sic\n");
    let expected = ", line 4, column 3: unknown key `train.stpes`\n  4 |   stpes = 60 # sic\n    |   ^^^^^";
    assert_eq!((message.as_str(), hint.as_str()), (expected, "did you mean `train.steps`?"));

    let (message, _) = refused_file("[model]\nimage = 32\n[optim]\nlr = \"fast\"\n");
    assert_eq!(
        message,
        ", line 4, column 6: `optim.lr` is the text `fast`, expected a number\n  4 | lr = \"fast\"\n    |      ^^^^^^"
    );

    let (message, _) = refused_file("[[optim.groups]]\npattern = 'a'\n[[optim.groups]]\nfrozen = 'yes'\n");
    assert!(
        message.starts_with(", line 4, column 10: `optim.groups[1].frozen` is the text `yes`"),
        "{message}"
    );

    let (message, _) = refused_file("[train]\nsteps = 5\nsteps = 6\n");
    assert!(message.starts_with(", line 3, column 1: duplicate key"), "{message}");

    let (message, _) = refused_file("[train]\nsteps = \n");
    assert!(message.starts_with(", line 2, column"), "{message}");

    let (message, _) = refused_file("[model]\nvariant = 'Ti/16'\nheads = 5\n[train]\nsteps = 9\n");
    assert!(
        message.starts_with(", line 3, column 9: `model.heads` is 5, which does not divide"),
        "{message}"
    );

    let (message, _) = refused_file("train = 5\n");
    assert!(message.starts_with(", line 1, column 1: `train` is 5, expected a section"), "{message}");
}

#[test]
fn files_are_recipes_named_after_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.toml");
    fs::write(&path, "[model]\nvariant = \"mu/8\"\nimage = 32\n[train]\nepochs = 3\n").unwrap();
    let loaded = Recipe::read(path.to_str(), &["model.heads=4".into()]).unwrap();
    assert_eq!(loaded.name, "mine");
    let model = loaded.recipe.model_config(10).unwrap();
    assert_eq!((model.width, model.heads, model.mlp, model.classes, model.patch), (32, 4, 128, 10, (8, 8)));
}

#[test]
fn a_missing_recipe_lists_the_built_in_ones() {
    let (message, hint) = usage(load("dmeo", &[]).unwrap_err());
    assert_eq!(message, "there is no recipe `dmeo`");
    let names = BUILT_IN.map(|(name, _)| format!("`{name}`")).join(", ");
    let expected =
        format!("did you mean `demo`? the built-in recipes are {names}; or give the path of a .toml file");
    assert_eq!(hint, expected);
    assert_eq!(usage(load("no/such.toml", &[]).unwrap_err()).0, "there is no file `no/such.toml`");
}

#[test]
fn what_cannot_be_trained_is_refused_by_its_key() {
    for (set, expected) in [
        (&["train.batch=0"][..], "`train.batch` is 0"),
        (&["train.steps=0"], "`train.steps` is 0"),
        (&["train.epochs=0"], "`train.epochs` is 0"),
        (&["train.epochs=nan"], "`train.epochs` is NaN"),
        (&["train.micro_batch=48"], "`train.micro_batch` is 48, which does not divide `train.batch` 64"),
        (&["train.log_every=0"], "`train.log_every` is 0"),
        (&["data.slots=1"], "`data.slots` is 1"),
        (&["model.heads=5"], "`model.heads` is 5, which does not divide `model.width` 64"),
        (&["model.heads=0"], "`model.heads` is 0"),
        (&["model.image=30"], "the patch height 4 does not divide the image height 30"),
        (&["model.image=0"], "`model.image` is 0"),
        (&["model.dropout=1"], "`model.dropout` is 1"),
        (&["model.width=999999999999"], "`model.width` is 999999999999"),
        (&["model.variant=Z/16"], "`Z/16` is not a model variant"),
        (&["optim.lr=-1"], "`optim.lr` is -1"),
        (&["optim.lr=inf"], "`optim.lr` is inf"),
        (&["optim.beta2=1.2"], "`optim.beta2` is 1.2"),
        (&["augment.area=[0.5, 0.2]"], "`augment.area` is [0.5, 0.2]"),
        (&["loss.label_smoothing=1.1"], "`loss.label_smoothing` is 1.1"),
        (&["augment.mixup=-0.2"], "`augment.mixup` is -0.2"),
    ] {
        let (message, hint) = refused(set);
        assert_eq!(message, expected);
        assert!(!hint.is_empty(), "{expected}");
    }
    assert!(
        refused(&["optim.groups=[{pattern='('}]"])
            .0
            .starts_with("`optim.groups[0].pattern` is not a regular")
    );
}

#[test]
fn classes_come_from_the_data_or_must_agree_with_it() {
    assert_eq!(demo(&[]).model_config(10).unwrap().classes, 10);
    assert_eq!(demo(&["model.classes=10"]).model_config(10).unwrap().classes, 10);
    let error = demo(&["model.classes=7"]).model_config(10).unwrap_err();
    assert_eq!(error.message(), "`model.classes` is 7, but the training data has 10 classes");
    assert_eq!(error.kind(), Kind::Failure);
    assert_eq!(demo(&[]).model_config(0).unwrap_err().kind(), Kind::Usage);
}

#[test]
fn overrides_work_without_a_model_or_a_length() {
    let base = Recipe::default();
    let recipe = base.with(&["optim.name=sgd".into(), "schedule.kind=rsqrt".into()]).unwrap();
    assert_eq!(recipe.optim.name, OptimName::Sgd);
    assert_eq!(base.with(&["optim.beta1=2".into()]).unwrap_err().message(), "`optim.beta1` is 2");
    assert_eq!(base.with(&[]).unwrap(), base);
}

#[test]
fn class_weights_are_a_word_or_a_number_for_each_class() {
    let of = |value: &str| demo(&[&format!("loss.class_weights={value}")]);
    assert_eq!(demo(&[]).loss.class_weights, ClassWeights::None);
    assert_eq!(of("none"), demo(&[]));
    assert_eq!(of("balanced").loss.class_weights, ClassWeights::Balanced);
    let ten = "[1,2,0.5,1,1,1,1,1,1,1e-3]";
    let list = vec![1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e-3];
    assert_eq!(of(ten).loss.class_weights, ClassWeights::Given(list));
    for value in ["none", "balanced", ten] {
        let text = of(value).to_toml();
        assert_eq!(Recipe::from_toml(&text, "recipe.toml").unwrap(), of(value), "{text}");
    }
    // Written either way they are the same numbers.
    assert_eq!(of("[1,1,1,1,1,1,1,1,1,2]").differences(&of("[1.0,1,1,1,1,1,1,1,1,2.0]")), []);
    assert_eq!(of("balanced").differences(&of(ten))[0].key, "loss.class_weights");

    for (value, expected) in [
        ("[1,2,0]", "`loss.class_weights[2]` is 0"),
        ("[1,-2,0]", "`loss.class_weights[1]` is -2"),
        ("[nan]", "`loss.class_weights[0]` is NaN"),
        ("[1,inf]", "`loss.class_weights[1]` is inf"),
        // Zero in f32.
        ("[1e-60]", "`loss.class_weights[0]` is 0.000000"),
        ("balancd", "`loss.class_weights` is the text `balancd`, expected \"none\", \"balanced\", or a list"),
        ("2", "`loss.class_weights` is 2, expected \"none\""),
        (
            "[1,'a']",
            "`loss.class_weights` is a list, expected \"none\", \"balanced\", or a list of one number",
        ),
    ] {
        let (message, _) = refused(&[&format!("loss.class_weights={value}")]);
        assert!(message.starts_with(expected), "{value}: {message}");
    }
    let (message, hint) = refused(&["loss.class_weights=[1,2]", "model.classes=10"]);
    assert_eq!(message, "`loss.class_weights` has 2 numbers, and there are 10 classes");
    assert_eq!(hint, "give 10 numbers, one for each class in their order");
    let error = of(ten).resolved(3, 100).unwrap_err();
    assert_eq!(error.message(), "`loss.class_weights` has 10 numbers, and there are 3 classes");

    let (message, hint) = refused(&["loss.class_weights=balanced", "data.balance=true"]);
    assert!(message.contains("rare classes twice"), "{message}");
    assert!(hint.contains("--set data.balance=false"), "{hint}");
    assert!(load("demo", &["data.balance=true", &format!("loss.class_weights={ten}")]).is_ok());

    let (message, hint) = refused_file(
        "[model]\nvariant = \"Ti/16\"\nclasses = 3\n[train]\nsteps = 10\n[loss]\nclass_weights = [1, 2]\n",
    );
    assert!(message.starts_with(", line 7, column 17: `loss.class_weights` has 2 numbers"), "{message}");
    assert!(hint.contains("in their order"), "{hint}");
}

#[test]
fn shares_and_means_are_in_their_units() {
    for (set, says) in [
        ("data.holdout=10", "`data.holdout` is 10"),
        ("data.holdout=-0.1", "`data.holdout` is -0.1"),
        ("data.holdout=nan", "`data.holdout` is NaN"),
        ("data.mean=[127.5,127.5,127.5]", "pixels go from 0 to 1"),
    ] {
        let error = Recipe::read(Some("demo"), &[set.into()]).err().unwrap();
        assert!(error.message().contains(says) && error.hint_text().is_some(), "{set}: {error}");
    }
    Recipe::read(Some("demo"), &["data.holdout=0".into()]).unwrap();
}
