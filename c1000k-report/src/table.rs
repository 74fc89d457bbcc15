//! Tables in Markdown, aligned for a terminal.

use crate::escape::markdown;

/// Wider cells are not aligned, so that a single one does not widen the whole column.
const WIDTH_MAX: usize = 120;

/// A table with a heading; all columns but the first are right-aligned.
pub(crate) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    columns(heading, rows, |column| column > 0)
}

/// A table of text with one right-aligned column, the last but one.
pub(crate) fn table_with_notes<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    columns(heading, rows, |column| column + 2 == N)
}

/// A table with left-aligned columns.
pub(crate) fn text_table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    columns(heading, rows, |_| false)
}

/// A table with a heading; columns of figures are right-aligned.
pub(crate) fn columns<const N: usize>(
    heading: [&str; N],
    rows: &[[String; N]],
    is_right: impl Fn(usize) -> bool,
) -> String {
    let heading = heading.map(markdown);
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| markdown(cell))).collect();
    let mut widths = heading.each_ref().map(|title| title.chars().count().max(3));
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().min(WIDTH_MAX).max(*width);
        }
    }
    let line = |cells: [&str; N]| {
        let mut line = "|".to_owned();
        for (column, (cell, width)) in cells.into_iter().zip(widths).enumerate() {
            let text = if is_right(column) {
                format!(" {cell:>width$} |")
            } else {
                format!(" {cell:<width$} |")
            };
            line.push_str(&text);
        }
        line.push('\n');
        line
    };
    let mut table = line(heading.each_ref().map(String::as_str));
    table.push('|');
    for (column, width) in widths.into_iter().enumerate() {
        let end = if is_right(column) { ":" } else { " " };
        table.push_str(&format!(" {}{end}|", "-".repeat(width)));
    }
    table.push('\n');
    table.extend(rows.iter().map(|row| line(row.each_ref().map(String::as_str))));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_its_columns() {
        let rows = [["a".to_owned(), "1,000".to_owned()], ["b|c".to_owned(), "1".to_owned()]];
        assert_eq!(
            table(["what", "n"], &rows),
            "| what |     n |\n| ---- | -----:|\n| a    | 1,000 |\n| b\\|c |     1 |\n"
        );
    }

    #[test]
    fn one_long_cell_does_not_make_the_others_as_long() {
        let rows: Vec<_> = ["x".repeat(3_000), "y".to_owned()].map(|cell| [cell]).into();
        assert_eq!(table([""], &rows).len(), 2 * (WIDTH_MAX + 5) + 3_005 + WIDTH_MAX + 5);
    }
}
