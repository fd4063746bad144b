//! The page: complete, well-formed, and safe whatever names it shows.

use super::*;
use crate::report::{Bin, Confused, Png, Wrong};

/// A run of `classes` classes whose names would be markup.
fn run(name: &str, classes: usize, top1: [f64; 2]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    let mut lines = String::new();
    for step in 1..=40 {
        let loss = 2.0 / step as f64;
        lines += &format!(
            "{{\"step\":{},\"epoch\":1,\"loss\":{loss},\"lr\":0.1,\"grad_norm\":1,\"top1\":0.5,\"img_per_s\":900,\
             \"data_wait\":0.01,\"mfu\":null,\"skipped\":0,\"seconds\":{step},\"gpu\":{{\"celsius\":61}}}}\n",
            step * 10
        );
    }
    for (i, top1) in top1.iter().enumerate() {
        let step = 200 * (i + 1);
        lines += &format!(
            "{{\"step\":{step},\"eval\":{{\"loss\":1.5,\"top1\":{top1},\"top5\":0.9,\"ema\":{{\"loss\":1.4,\"top1\":{top1}}}}}}}\n"
        );
    }
    std::fs::write(dir.join("metrics.jsonl"), lines).unwrap();
    std::fs::write(dir.join("recipe.toml"), format!("[optim]\nlr = {}\n[train]\nname = \"<b>\"\n", top1[0]))
        .unwrap();
    let confusion =
        (0..classes as u32).flat_map(|c| [Confused(c, c, 8), Confused(c, (c + 1) % classes as u32, 2)]);
    let details = Details {
        classes: (0..classes).map(|c| format!("<i>{c}\"'&")).collect(),
        confusion: confusion.collect(),
        calibration: vec![Bin { images: 10, confidence: 7.0, right: 8 }; 10],
        worst: vec![Wrong {
            name: "a/<script>alert(1)</script>.png".into(),
            truth: 0,
            of_truth: 0.01,
            predicted: 1,
            probability: 0.9,
            picture: Png::new(1, 1, vec![1, 2, 3]),
        }],
        facts: vec![("device".into(), "<cpu>".into())],
        ..Details::default()
    };
    std::fs::write(dir.join("report.json"), serde_json::to_vec(&details).unwrap()).unwrap();
    (folder, dir)
}

/// Panics unless every tag is closed in order.
fn assert_well_formed(html: &str) {
    const VOID: [&str; 5] = ["meta", "link", "img", "br", "!doctype"];
    let mut open: Vec<&str> = Vec::new();
    // The style sheet has no tags.
    for part in html.split('<').skip(1) {
        let tag = part.split('>').next().unwrap();
        let name = tag.split([' ', '/']).find(|word| !word.is_empty()).unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "`<{tag}>` closes something else");
        } else if !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?} are not closed");
}

#[test]
fn a_page_needs_nothing_else_and_shows_names_as_text() {
    let (_folder, dir) = run("run <u>", 10, [0.5, 0.75]);
    let path = RunPage::write(&dir).unwrap();
    let html = std::fs::read_to_string(path).unwrap();
    assert_well_formed(&html);
    for markup in ["<u>", "<i>", "<script", "<cpu>", "<b>\"", "http:", "https:", "url(", "@import"] {
        assert!(!html.contains(markup), "{markup}");
    }
    for part in [
        "Loss",
        "Top-1",
        "Learning rate",
        "Gradient norm",
        "gpu celsius",
        "Confusion",
        "Calibration",
        "Most confused",
        "75.0 %",
        "prefers-color-scheme",
        "lang=\"en\"",
    ] {
        assert!(html.contains(part), "{part}");
    }
    assert!(!html.contains("NaN") && !html.contains("(MFU)"), "nothing is drawn of what no line has");
    // Every drawing has a name for readers, and numbers behind it.
    assert_eq!(html.matches("<svg").count(), html.matches("role=\"img\" aria-label=").count());
    assert!(html.matches("<details>").count() >= 8);
    let csv = std::fs::read_to_string(dir.join("results.csv")).unwrap();
    assert!(csv.starts_with("step,epoch,loss,lr") && csv.lines().count() == 41, "{csv}");
}

#[test]
fn the_confusion_matrix_has_room_for_any_number_of_classes() {
    for classes in [2, 10, 100, 1000] {
        let (_folder, dir) = run("run", classes, [0.5, 0.75]);
        let html = RunPage::read(&dir).unwrap().html();
        assert_well_formed(&html);
        assert!(html.len() < 2_000_000, "{classes} classes: {} bytes", html.len());
        assert_eq!(html.contains("10 classes in each row"), classes == 1000);
    }
}

#[test]
fn runs_are_compared_by_what_differs_and_the_best_is_marked() {
    let (_a, a) = run("low", 3, [0.25, 0.5]);
    let (_b, b) = run("high", 3, [0.5, 0.9]);
    let runs = runs_in(&[a.clone(), b]).unwrap();
    let html = comparison(&runs);
    assert_well_formed(&html);
    assert!(html.contains("optim.lr") && !html.contains("train.name"), "only settings that differ");
    let best = html.split("class=\"best\"").nth(1).unwrap();
    assert!(best.starts_with(">90.0 % ★ best"), "{}", &best[..40]);
    assert_eq!(html.matches("★ best").count(), 1);
    // A folder of runs is a sweep.
    let sweep = a.parent().unwrap().to_owned();
    assert_eq!(runs_in(&[sweep]).unwrap().len(), 1);
}

#[test]
fn a_run_without_an_evaluation_or_a_broken_file_has_a_page_or_an_error() {
    let (_folder, dir) = run("run", 3, [0.5, 0.6]);
    std::fs::remove_file(dir.join("report.json")).unwrap();
    std::fs::write(dir.join("metrics.jsonl"), "").unwrap();
    assert_well_formed(&RunPage::read(&dir).unwrap().html());
    std::fs::write(dir.join("report.json"), "{\"step\": \"x\"}").unwrap();
    let error = RunPage::read(&dir).unwrap_err();
    assert!(error.message().contains("report.json"), "{error}");
    let error = runs_in(&[dir.join("nowhere")]).unwrap_err();
    assert!(error.message().contains("nowhere"), "{error}");
}
