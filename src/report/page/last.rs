//! The last evaluation on the page: confusion, accuracy by class, calibration and the worst pictures.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::chart::{clip, figure, heat_map, reliability};
use super::html::{escape, fold, table};
use crate::report::details::{Details, Png, Wrong};
use crate::report::format;

/// Rows and columns of a drawn confusion matrix. With more classes, neighbours share a cell.
const MOST_CELLS: usize = 100;
/// Pairs of classes in the list.
const MOST_PAIRS: usize = 15;
/// Classes in the list that is open.
const MOST_CLASSES: usize = 20;

/// The sections, or nothing before the first evaluation.
pub(super) fn sections(details: &Details) -> String {
    if details.confusion.is_empty() {
        return String::new();
    }
    let mut text = String::from("<h2 id=\"classes\">Classes</h2>\n<div class=\"grid\">\n");
    text += &confusion(details);
    text += &figure("Most confused", &pairs(details));
    text += &figure("Accuracy by class, the lowest first", &by_class(details));
    text += &calibration(details);
    text += "</div>\n";
    if !details.worst.is_empty() {
        text += "<h2 id=\"worst\">Most wrongly predicted</h2>\n<p class=\"soft\">The validation pictures whose true class \
                 got the least probability, as the model saw them. A wrong label is a common reason.</p>\n";
        let pictures: String = details.worst.iter().map(|wrong| picture(details, wrong)).collect();
        writeln!(text, "<ul class=\"pictures\">{pictures}</ul>").unwrap();
    }
    text
}

fn name(details: &Details, class: u32) -> String {
    details.classes.get(class as usize).cloned().unwrap_or_else(|| format!("class {class}"))
}

/// Pictures of each class, and how many of them are right.
fn totals(details: &Details) -> BTreeMap<u32, (u64, u64)> {
    let mut of: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    for cell in &details.confusion {
        let class = of.entry(cell.0).or_default();
        class.0 = class.0.saturating_add(cell.2);
        class.1 = class.1.saturating_add(if cell.0 == cell.1 { cell.2 } else { 0 });
    }
    of
}

fn confusion(details: &Details) -> String {
    let classes = details.classes.len().max(1);
    let size = classes.min(MOST_CELLS);
    let group = |class: u32| (class as usize * size / classes).min(size - 1);
    let mut cells: BTreeMap<(usize, usize), u64> = BTreeMap::new();
    let mut rows = vec![0u64; size];
    for cell in &details.confusion {
        let count: &mut u64 = cells.entry((group(cell.0), group(cell.1))).or_default();
        *count = count.saturating_add(cell.2);
        rows[group(cell.0)] = rows[group(cell.0)].saturating_add(cell.2);
    }
    let drawn: Vec<(usize, usize, f64, String)> = cells
        .iter()
        .map(|((row, column), count)| {
            (*row, *column, *count as f64 / rows[*row].max(1) as f64, count.to_string())
        })
        .collect();
    let about = "a row for each true class, a column for each predicted one; the darker, the larger the share of the row";
    let each = if size < classes {
        format!(", {} classes in each row", classes.div_ceil(size))
    } else {
        String::new()
    };
    let labels: Vec<String> = if size == classes { details.classes.clone() } else { Vec::new() };
    let map = heat_map("Confusion", about, size, &labels, &drawn);
    let note = format!("<p class=\"soft\">Rows: true class. Columns: predicted class{each}.</p>");
    let behind = if classes <= 30 { fold("Numbers", &matrix(details)) } else { String::new() };
    figure("Confusion", &format!("{map}{note}{behind}"))
}

/// The confusion matrix as a table.
fn matrix(details: &Details) -> String {
    let count: BTreeMap<(u32, u32), u64> = details.confusion.iter().map(|c| ((c.0, c.1), c.2)).collect();
    let classes = 0..details.classes.len() as u32;
    let row = |truth: u32| {
        let cells = classes
            .clone()
            .map(|predicted| count.get(&(truth, predicted)).map_or(String::new(), u64::to_string));
        [name(details, truth)].into_iter().chain(cells).collect()
    };
    let head: Vec<&str> =
        ["true \\ predicted"].into_iter().chain(details.classes.iter().map(String::as_str)).collect();
    table(
        "Pictures by true class (rows) and predicted class (columns)",
        &head,
        &classes.clone().map(row).collect::<Vec<_>>(),
    )
}

fn pairs(details: &Details) -> String {
    let totals = totals(details);
    let mut pairs: Vec<_> = details.confusion.iter().filter(|cell| cell.0 != cell.1).collect();
    pairs.sort_by_key(|cell| (std::cmp::Reverse(cell.2), cell.0, cell.1));
    if pairs.is_empty() {
        return "<p>Every picture is right.</p>".into();
    }
    let row = |cell: &&crate::report::details::Confused| {
        let share = cell.2 as f64 / totals[&cell.0].0.max(1) as f64;
        vec![name(details, cell.0), name(details, cell.1), cell.2.to_string(), format::percent(share)]
    };
    let rows: Vec<Vec<String>> = pairs.iter().take(MOST_PAIRS).map(row).collect();
    table(
        "Pairs of classes with the most mistakes",
        &["true", "predicted", "pictures", "of the class"],
        &rows,
    )
}

fn by_class(details: &Details) -> String {
    let share = |(images, right): (u64, u64)| right as f64 / images.max(1) as f64;
    let mut classes: Vec<(u32, (u64, u64))> = totals(details).into_iter().collect();
    classes.sort_by(|a, b| share(a.1).total_cmp(&share(b.1)).then(a.0.cmp(&b.0)));
    let rows = |classes: &[(u32, (u64, u64))]| -> String {
        let row = |(class, of): &(u32, (u64, u64))| {
            format!(
                "<tr><th scope=\"row\">{}</th><td>{}</td><td class=\"n\">{}</td><td class=\"barcell\"><span class=\"share\" style=\"width:{:.0}%\"></span></td></tr>",
                escape(&clip(&name(details, *class), 40)),
                of.0,
                format::percent(share(*of)),
                90.0 * share(*of).min(1.0)
            )
        };
        format!(
            "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Accuracy by class\"><table><thead><tr><th scope=\"col\">class</th><th scope=\"col\">pictures</th>\
             <th scope=\"col\">right</th><th scope=\"col\" aria-hidden=\"true\"></th></tr></thead><tbody>{}</tbody></table></div>",
            classes.iter().map(row).collect::<String>()
        )
    };
    let (low, more) = classes.split_at(classes.len().min(MOST_CLASSES));
    let folded = if more.is_empty() {
        String::new()
    } else {
        fold(&format!("The other {} classes", more.len()), &rows(more))
    };
    rows(low) + &folded
}

fn calibration(details: &Details) -> String {
    let images: f64 = details.calibration.iter().map(|bin| bin.images as f64).sum();
    if images == 0.0 {
        return String::new();
    }
    let gap = |bin: &crate::report::details::Bin| (bin.confidence - bin.right as f64).abs();
    let error = details.calibration.iter().map(gap).sum::<f64>() / images;
    let bars: Vec<(f64, f64)> = details
        .calibration
        .iter()
        .map(|bin| (bin.images as f64, bin.right as f64 / bin.images.max(1) as f64))
        .collect();
    let about = "share of right answers for each range of the model's probability; bars that end at the dashed line are calibrated";
    let n = details.calibration.len() as f64;
    let row = |(i, bin): (usize, &crate::report::details::Bin)| {
        let of = bin.images.max(1) as f64;
        let range = format!("{:.0} to {:.0} %", 100.0 * i as f64 / n, 100.0 * (i + 1) as f64 / n);
        vec![
            range,
            bin.images.to_string(),
            format::percent(bin.confidence / of),
            format::percent(bin.right as f64 / of),
        ]
    };
    let rows: Vec<Vec<String>> =
        details.calibration.iter().enumerate().filter(|(_, bin)| bin.images > 0).map(row).collect();
    let numbers = fold(
        "Numbers",
        &table("Calibration", &["probability", "pictures", "mean probability", "right"], &rows),
    );
    let note = format!(
        "<p class=\"soft\">Right answers (bars) by the probability of the answer. Expected calibration error: {}.</p>",
        format::percent(error)
    );
    figure("Calibration", &format!("{}{note}{numbers}", reliability("Calibration", about, &bars)))
}

fn picture(details: &Details, wrong: &Wrong) -> String {
    let (truth, predicted) = (name(details, wrong.truth), name(details, wrong.predicted));
    format!(
        "<li>{}<b>{}</b> <span class=\"n\">{}</span><br>true: {} <span class=\"n\">{}</span><br>{}</li>",
        image(
            &wrong.picture,
            &format!("{truth}, predicted as {predicted}"),
            if wrong.picture.width <= 64 { "small" } else { "" }
        ),
        escape(&predicted),
        format::percent(wrong.probability),
        escape(&truth),
        format::percent(wrong.of_truth),
        escape(&wrong.name)
    )
}

/// A picture inside the page.
pub(super) fn image(png: &Png, says: &str, class: &str) -> String {
    // Only digits of base64 are copied: a damaged file cannot add markup.
    let is_digit = |c: &char| c.is_ascii_alphanumeric() || "+/=".contains(*c);
    let data: String = png.base64.chars().filter(is_digit).collect();
    format!(
        "<img class=\"{class}\" alt=\"{}\" width=\"{}\" height=\"{}\" style=\"height:auto\" src=\"data:image/png;base64,{data}\">",
        escape(says),
        png.width,
        png.height
    )
}
