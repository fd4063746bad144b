//! Line charts and heat maps as SVG. A chart has a title for screen readers, and its numbers as a table below it.

use std::fmt::Write as _;

use super::super::history::Curve;
use super::html::{escape, fold, number, table};

/// Size of a chart in its own units; the page scales it to its column.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 270.0;
/// Room for the numbers at the axes.
const LEFT: f64 = 62.0;
const BOTTOM: f64 = 34.0;
const TOP: f64 = 10.0;
const RIGHT: f64 = 14.0;
/// More points than pixels would only make the page large.
const MOST_POINTS: usize = 400;
/// Rows of the table below a chart.
const MOST_ROWS: usize = 25;
/// Colours that the page's style sheet has.
pub(super) const COLOURS: usize = 8;

/// How values are written at an axis and in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// As they are.
    Plain,
    /// Shares as percent.
    Percent,
}

impl Unit {
    /// A value as text.
    pub(super) fn text(self, value: f64) -> String {
        match self {
            Self::Plain => number(value),
            Self::Percent => format!("{:.1} %", 100.0 * value),
        }
    }
}

/// One curve of a chart.
pub(super) struct Series {
    /// In the legend.
    pub(super) name: String,
    /// By step.
    pub(super) curve: Curve,
    /// Number of its colour.
    pub(super) colour: usize,
    /// Drawn with dashes.
    pub(super) dashed: bool,
}

impl Series {
    /// A line.
    pub(super) fn new(name: &str, curve: Curve, colour: usize) -> Self {
        Self { name: name.into(), curve, colour: colour % COLOURS, dashed: colour / COLOURS % 2 == 1 }
    }

    /// The same, dashed.
    pub(super) fn dashed(self) -> Self {
        Self { dashed: true, ..self }
    }
}

/// A figure with curves over the steps of a run, its legend and its numbers. Curves without points are left out;
/// nothing at all if none has any.
pub(super) fn lines(title: &str, unit: Unit, series: &[Series]) -> String {
    let series: Vec<&Series> = series.iter().filter(|series| !series.curve.is_empty()).collect();
    let all = || series.iter().flat_map(|series| &series.curve);
    let Some(most) = all().map(|(step, _)| *step).reduce(f64::max) else { return String::new() };
    let (low, high) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (_, value)| {
        (low.min(*value), high.max(*value))
    });
    // A flat curve lies in the middle.
    let room = if high > low { 0.0 } else { high.abs().max(1e-9) * 0.1 };
    let ticks = ticks(low - room, high + room);
    let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
    let x = |step: f64| LEFT + (WIDTH - LEFT - RIGHT) * step / most.max(1.0);
    let y = |value: f64| TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low);
    let mut svg = String::new();
    let names: Vec<&str> = series.iter().map(|series| series.name.as_str()).collect();
    let last: Vec<String> = series
        .iter()
        .map(|series| {
            format!("{} ends at {}", series.name, unit.text(series.curve[series.curve.len() - 1].1))
        })
        .collect();
    open(&mut svg, title, &format!("{} over {} steps. {}.", names.join(", "), most, last.join("; ")));
    for tick in &ticks {
        let at = y(*tick);
        write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
            WIDTH - RIGHT
        )
        .unwrap();
        let shown = if unit == Unit::Percent { format!("{} %", short(100.0 * tick)) } else { short(*tick) };
        write!(svg, "<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{shown}</text>", LEFT - 8.0, at + 5.0)
            .unwrap();
    }
    write!(svg, "<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">step</text>", LEFT - 8.0, HEIGHT - 10.0)
        .unwrap();
    for part in 0..=4 {
        let step = most * f64::from(part) / 4.0;
        let anchor = ["start", "middle", "middle", "middle", "end"][part as usize];
        write!(
            svg,
            "<text class=\"{anchor}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x(step),
            HEIGHT - 10.0,
            short(step.round())
        )
        .unwrap();
    }
    for series in &series {
        let class = format!("line c{}{}", series.colour, if series.dashed { " dashed" } else { "" });
        let points: Vec<String> = thin(&series.curve, MOST_POINTS)
            .iter()
            .map(|(step, value)| format!("{:.1},{:.1}", x(*step), y(*value)))
            .collect();
        write!(svg, "<polyline class=\"{class}\" points=\"{}\"/>", points.join(" ")).unwrap();
        // Single points, and the few of evaluations, are hard to see as lines.
        if series.curve.len() <= 30 {
            for (step, value) in &series.curve {
                write!(
                    svg,
                    "<circle class=\"dot c{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                    series.colour,
                    x(*step),
                    y(*value)
                )
                .unwrap();
            }
        }
    }
    svg += "</svg>";
    let legend: String = series
        .iter()
        .map(|series| {
            let dashed = if series.dashed { " dashed" } else { "" };
            format!("<li><span class=\"key c{}{dashed}\"></span>{}</li>", series.colour, escape(&series.name))
        })
        .collect();
    let legend = if series.len() > 1 { format!("<ul class=\"legend\">{legend}</ul>") } else { String::new() };
    figure(title, &format!("{svg}{legend}{}", fold("Numbers", &numbers(title, unit, &series))))
}

/// A figure around a drawing.
pub(super) fn figure(title: &str, inside: &str) -> String {
    format!("<figure><figcaption>{}</figcaption>{inside}</figure>\n", escape(title))
}

fn open(svg: &mut String, title: &str, about: &str) {
    write!(
        svg,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}: {}\"><title>{}</title>",
        escape(title),
        escape(about),
        escape(title)
    )
    .unwrap();
}

/// The curves as a table, thinned to some rows.
fn numbers(title: &str, unit: Unit, series: &[&Series]) -> String {
    let mut steps: Vec<u64> =
        series.iter().flat_map(|series| &series.curve).map(|(step, _)| *step as u64).collect();
    steps.sort_unstable();
    steps.dedup();
    let chosen: Vec<u64> = match steps.len() {
        0..=MOST_ROWS => steps,
        n => (0..MOST_ROWS).map(|i| steps[i * (n - 1) / (MOST_ROWS - 1)]).collect(),
    };
    let head: Vec<&str> =
        ["step"].into_iter().chain(series.iter().map(|series| series.name.as_str())).collect();
    let value = |series: &Series, step: u64| {
        let found = series.curve.binary_search_by(|(at, _)| at.total_cmp(&(step as f64)));
        found.map_or(String::new(), |i| unit.text(series.curve[i].1))
    };
    let row = |step: &u64| {
        [step.to_string()].into_iter().chain(series.iter().map(|series| value(series, *step))).collect()
    };
    table(title, &head, &chosen.iter().map(row).collect::<Vec<_>>())
}

/// At most `most` points: the first and last of the curve, and between them the mean of neighbours.
fn thin(curve: &[(f64, f64)], most: usize) -> Curve {
    if curve.len() <= most {
        return curve.to_vec();
    }
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
    };
    let inner = &curve[1..curve.len() - 1];
    let mut points = vec![curve[0]];
    points.extend(inner.chunks(inner.len().div_ceil(most - 2)).map(mean));
    points.push(curve[curve.len() - 1]);
    points
}

/// Round numbers from at most `low` to at least `high`, four to seven of them.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let span = (high - low).max(f64::MIN_POSITIVE);
    let power = 10f64.powf((span / 5.0).log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| span / step <= 5.0);
    let step = step.unwrap_or(power * 10.0);
    let (first, last) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
    (0..=(last - first).max(1.0) as usize).map(|i| (first + i as f64) * step).collect()
}

/// A number at an axis.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        v if v >= 1e9 => format!("{}G", trim(value / 1e9)),
        v if v >= 1e6 => format!("{}M", trim(value / 1e6)),
        v if v >= 1e4 => format!("{}k", trim(value / 1e3)),
        v if v < 1e-2 => {
            let text = format!("{value:.1e}");
            text.replace(".0e", "e")
        }
        _ => trim(value),
    }
}

fn trim(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// A square of cells: row, column, share in [0, 1] and what it says. `labels` are those of rows and columns if there
/// is room for them.
pub(super) fn heat_map(
    title: &str,
    about: &str,
    size: usize,
    labels: &[String],
    cells: &[(usize, usize, f64, String)],
) -> String {
    let with_labels = labels.len() == size && size <= 30;
    let longest = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0) as f64;
    let edge = if with_labels { (longest * 8.5 + 12.0).clamp(34.0, 110.0) } else { 14.0 };
    let (side, total) = (480.0 - edge, 480.0);
    let cell = side / size as f64;
    let mut svg = format!(
        "<svg class=\"map\" viewBox=\"0 0 {total} {total}\" role=\"img\" aria-label=\"{}: {}\"><title>{}</title>\
         <rect class=\"frame\" x=\"{edge}\" y=\"0\" width=\"{side}\" height=\"{side}\"/>",
        escape(title),
        escape(about),
        escape(title)
    );
    for (row, column, share, says) in cells {
        let (x, y) = (edge + *column as f64 * cell, *row as f64 * cell);
        let opacity = 0.08 + 0.92 * share.clamp(0.0, 1.0);
        let kind = if row == column { "right" } else { "wrong" };
        write!(
            svg,
            "<rect class=\"{kind}\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{cell:.2}\" height=\"{cell:.2}\" fill-opacity=\"{opacity:.2}\"/>"
        )
        .unwrap();
        if size <= 12 {
            let shade = if opacity > 0.55 { "on" } else { "off" };
            write!(
                svg,
                "<text class=\"middle {shade}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                x + cell / 2.0,
                y + cell / 2.0 + 5.0,
                escape(says)
            )
            .unwrap();
        }
    }
    if with_labels {
        let font = (cell * 0.8).min(14.0);
        let most = ((edge - 6.0) / font * 1.75) as usize;
        for (i, label) in labels.iter().enumerate() {
            let at = (i as f64 + 0.5) * cell;
            let name = escape(&clip(label, most));
            write!(
                svg,
                "<text class=\"end\" style=\"font-size:{font:.1}px\" x=\"{:.1}\" y=\"{:.1}\">{name}</text>",
                edge - 6.0,
                at + font * 0.35
            )
            .unwrap();
            write!(
                svg,
                "<text class=\"end\" style=\"font-size:{font:.1}px\" transform=\"translate({:.1} {:.1}) rotate(-90)\">{name}</text>",
                edge + at + font * 0.35,
                side + 6.0
            )
            .unwrap();
        }
    }
    svg + "</svg>"
}

/// The first characters of a name, with an ellipsis if there are more.
pub(super) fn clip(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most.saturating_sub(1)).collect::<String>() + "…",
        false => text.into(),
    }
}

/// Bars of accuracy by confidence, each from 0 to 1, and the diagonal on which they should end.
pub(super) fn reliability(title: &str, about: &str, bars: &[(f64, f64)]) -> String {
    let mut svg = String::new();
    open(&mut svg, title, about);
    let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    let (x, y) = (|share: f64| LEFT + width * share, |share: f64| TOP + height * (1.0 - share));
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/><text class=\"end\" x=\"{2:.1}\" y=\"{3:.1}\">{4:.0} %</text>\
             <text class=\"middle\" x=\"{5:.1}\" y=\"{6:.1}\">{4:.0} %</text>",
            WIDTH - RIGHT,
            y(tick),
            LEFT - 8.0,
            y(tick) + 5.0,
            100.0 * tick,
            x(tick).min(WIDTH - RIGHT - 12.0),
            HEIGHT - 10.0
        )
        .unwrap();
    }
    let one = 1.0 / bars.len().max(1) as f64;
    for (i, (_, accuracy)) in bars.iter().enumerate().filter(|(_, (images, _))| *images > 0.0) {
        write!(
            svg,
            "<rect class=\"bar c0\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
            x(i as f64 * one) + 1.0,
            y(*accuracy),
            width * one - 2.0,
            height * accuracy
        )
        .unwrap();
    }
    write!(
        svg,
        "<line class=\"diagonal\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/></svg>",
        x(0.0),
        y(0.0),
        x(1.0),
        y(1.0)
    )
    .unwrap();
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_enclose_the_values() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        for (low, high) in [(0.013, 0.97), (-3.0, 12.0), (1e-5, 1.1e-3), (999.0, 1001.0)] {
            let ticks = ticks(low, high);
            assert!(ticks[0] <= low && ticks[ticks.len() - 1] >= high, "{ticks:?}");
            assert!((3..=8).contains(&ticks.len()), "{ticks:?}");
        }
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_ends() {
        let curve: Curve = (0..10_000).map(|i| (f64::from(i), f64::from(i))).collect();
        let thinned = thin(&curve, 400);
        assert!(thinned.len() <= 401 && thinned[0] == curve[0] && thinned[thinned.len() - 1] == curve[9999]);
        assert!(thinned.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn every_point_of_a_chart_lies_inside_of_it() {
        let curve = vec![(1.0, -5.0), (50.0, 1e6), (100.0, 3.0)];
        let svg =
            lines("loss", Unit::Plain, &[Series::new("a <b>", curve, 0), Series::new("none", Vec::new(), 1)]);
        assert!(!svg.contains("<b>") && !svg.contains("none") && !svg.contains("NaN"), "{svg}");
        let points = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        for point in points.split(' ') {
            let (x, y) = point.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!(
                (LEFT..=WIDTH).contains(&x) && (TOP - 0.1..=HEIGHT - BOTTOM + 0.1).contains(&y),
                "{point}"
            );
        }
        assert_eq!(lines("loss", Unit::Plain, &[Series::new("none", Vec::new(), 0)]), "");
        let flat = lines("rate", Unit::Plain, &[Series::new("a", vec![(1.0, 0.0)], 0)]);
        assert!(flat.contains("<polyline") && !flat.contains("NaN") && !flat.contains("inf"));
    }
}
