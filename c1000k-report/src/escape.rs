//! Escapes untrusted text for a terminal and for a page, so that it is shown and not interpreted.
//!
//! Names of files, lines of `machine.txt` and the strings of a record are such text. A terminal interprets control
//! codes, a page Markdown and HTML.

use std::fmt::Write;

use c1000k_host::format::is_unseen;
pub use c1000k_host::format::visible;

/// [`visible`] text, with Markdown and HTML escaped.
#[must_use]
pub(crate) fn markdown(text: &str) -> String {
    let shown = visible(text);
    let mut page = String::with_capacity(shown.len());
    let mut before = ' ';
    let mut rest = shown.chars();
    while let Some(character) = rest.next() {
        let after = rest.as_str();
        match character {
            '&' => page.push_str("&amp;"),
            '<' => page.push_str("&lt;"),
            '>' => page.push_str("&gt;"),
            _ if formats(before, character, after) => page.extend(['\\', character]),
            _ => page.push(character),
        }
        before = character;
    }
    page
}

/// JSON in which each invisible character is escaped; its meaning is unchanged.
#[must_use]
pub(crate) fn json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        // White space between values; within strings it is escaped already.
        if is_unseen(character) && !matches!(character, '\n' | '\t') {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Whether the character has a meaning in Markdown or GitHub's extensions.
fn formats(before: char, character: char, after: &str) -> bool {
    match character {
        '\\' | '`' | '*' | '[' | ']' | '|' | '~' | '$' => true,
        // Within a word it has none, as in `limit_detail`.
        '_' => !(before.is_alphanumeric() && after.starts_with(char::is_alphanumeric)),
        // A URL would become a link.
        ':' => after.starts_with("//"),
        '.' => before.eq_ignore_ascii_case(&'w'),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_gets_no_markup_and_keeps_what_reads_well() {
        let cases = [
            ("<b>x</b> & y", "&lt;b&gt;x&lt;/b&gt; &amp; y"),
            ("![i](http://h)", "!\\[i\\](http\\://h)"),
            ("**a** `b` ~c~ $d$ \\|", "\\*\\*a\\*\\* \\`b\\` \\~c\\~ \\$d\\$ \\\\\\|"),
            ("_a_ sock_inode_cache b_", "\\_a\\_ sock_inode_cache b\\_"),
            ("see www.x.org", "see www\\.x.org"),
            ("ulimit -n, 1.5 GB (a +- b): #1", "ulimit -n, 1.5 GB (a +- b): #1"),
        ];
        for (text, page) in cases {
            assert_eq!(markdown(text), page);
        }
    }

    #[test]
    fn json_means_the_same_afterwards() {
        let value = ["\u{9b}1m", "\u{202e}", "\u{e0041}", "line\nbreak \u{1b}", "ä"];
        let text = json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(
            text.chars().all(|character| character == '\n' || !is_unseen(character)),
            "{text:?}"
        );
        assert_eq!(serde_json::from_str::<Vec<String>>(&text).unwrap(), value);
    }
}
