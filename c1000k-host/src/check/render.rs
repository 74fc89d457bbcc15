//! Formats the table for users.

use {
    super::{Row, RowStatus},
    crate::format,
    std::fmt,
};

impl fmt::Display for RowStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::Advice => "advice",
            Self::Unknown => "unknown",
            Self::NotNeeded => "-",
        })
    }
}

/// The rows as an aligned table of plain text, each remedy below its row, and the overall status at the end.
pub fn render(rows: &[Row]) -> String {
    let width = |text: fn(&Row) -> &str, heading: &str| {
        rows.iter().map(|row| text(row).chars().count()).chain([heading.len()]).max().unwrap_or(0)
    };
    let name = width(|row| row.name, "limit");
    let needed = width(|row| &row.needed, "needed");
    let present = width(|row| &row.present, "present");
    let mut lines = vec![format!(
        "{:7}  {:name$}  {:>needed$}  {:>present$}",
        "", "limit", "needed", "present"
    )];
    for row in rows {
        lines.push(format!(
            "{:7}  {:name$}  {:>needed$}  {:>present$}",
            row.status, row.name, row.needed, row.present
        ));
        let remedy = row.remedy.as_deref().unwrap_or_default();
        lines.extend(remedy.lines().map(|line| format!("{:7}    {line}", "")));
    }
    lines.push(conclusion(rows));
    lines.push(String::new());
    lines.join("\n")
}

fn conclusion(rows: &[Row]) -> String {
    let failed = rows.iter().filter(|row| row.status == RowStatus::Fail).count();
    let unknown = rows.iter().filter(|row| row.status == RowStatus::Unknown).count();
    match failed {
        0 if unknown > 0 => {
            format!(
                "It fits, as far as known: {} could not be read.",
                format::counted(unknown as u64, "limit")
            )
        }
        0 => "It fits.".to_owned(),
        1 => "It does not fit: one limit is too low.".to_owned(),
        _ => format!("It does not fit: {failed} limits are too low."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, status: RowStatus, remedy: Option<&str>) -> Row {
        Row {
            name,
            needed: "1,000,132".to_owned(),
            present: "20,000".to_owned(),
            status,
            remedy: remedy.map(str::to_owned),
        }
    }

    #[test]
    fn columns_are_aligned_and_remedies_are_below() {
        let rows = [
            row("fs.nr_open", RowStatus::Pass, None),
            row("RLIMIT_NOFILE hard", RowStatus::Fail, Some("do this\nor that")),
        ];
        let expected = "         limit                  needed  present
pass     fs.nr_open          1,000,132   20,000
FAIL     RLIMIT_NOFILE hard  1,000,132   20,000
           do this
           or that
It does not fit: one limit is too low.
";
        assert_eq!(render(&rows), expected);
    }

    #[test]
    fn advice_and_unknown_rows_do_not_fail() {
        let rows = [row("a", RowStatus::Advice, None), row("c", RowStatus::NotNeeded, None)];
        assert!(render(&rows).ends_with("It fits.\n"));
        let rows = [row("a", RowStatus::Advice, None), row("b", RowStatus::Unknown, None)];
        assert!(render(&rows).ends_with("It fits, as far as known: 1 limit could not be read.\n"));
    }

    #[test]
    fn no_rows_are_an_empty_table_that_fits() {
        assert_eq!(render(&[]), "         limit  needed  present\nIt fits.\n");
    }
}
