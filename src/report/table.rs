//! Tables for people.

use crate::terminal::one_line;

/// A head, a line of dashes, and the rows. Newlines in cells are escaped. Columns of numbers are
/// right-aligned, all others left-aligned.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &[String], column: usize| {
        row.get(column).map_or(String::new(), |text| one_line(text).into_owned())
    };
    let is_number =
        |text: &str| text.is_empty() || text.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    let columns: Vec<(usize, bool)> = (0..head.len())
        .map(|column| {
            let cells = || rows.iter().map(|row| cell(row, column));
            let width = cells().map(|c| c.chars().count()).chain([head[column].chars().count()]).max();
            (width.unwrap_or(0), cells().all(|c| is_number(&c)))
        })
        .collect();
    let line = |cells: Vec<String>| {
        let padded = cells.iter().zip(&columns).map(|(text, (width, number))| match number {
            true => format!("{text:>width$}"),
            false => format!("{text:<width$}"),
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    let mut text = line(head.iter().map(ToString::to_string).collect());
    text += &line(columns.iter().map(|(width, _)| "-".repeat(*width)).collect());
    for row in rows {
        text += &line((0..head.len()).map(|column| cell(row, column)).collect());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_words_to_the_left() {
        let rows = [vec!["vit_jax".into(), "9.1 %".into()], vec!["timm".into(), "10.25 %".into()]];
        let expected = "protocol    top-1\n--------  -------\nvit_jax     9.1 %\ntimm      10.25 %\n";
        assert_eq!(table(&["protocol", "top-1"], &rows), expected);
        assert_eq!(table(&["a"], &[]), "a\n-\n");
        let two = [vec!["a\nb".into()]];
        assert_eq!(table(&["class"], &two), "class\n-----\na\\nb\n");
    }
}
