//! Text that others wrote, for a terminal and for a page: it shows all that is in it, and does nothing.
//!
//! Names of files, lines of `machine.txt` and the strings of a record are such text. A terminal obeys control
//! codes, and a page Markdown and HTML.

use std::fmt::Write;

/// More of one text than a person reads is cut off.
const CHARS_MAX: usize = 4_000;

/// The text in one line, in which each character that is not seen, or that moves others, is written as its escape.
#[must_use]
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(CHARS_MAX));
    let mut characters = text.chars();
    for character in characters.by_ref().take(CHARS_MAX) {
        if is_unseen(character) {
            let _ = write!(shown, "{}", character.escape_default());
        } else {
            shown.push(character);
        }
    }
    if characters.next().is_some() {
        shown.push('…');
    }
    shown
}

/// [`visible`] text in which Markdown and HTML find nothing to format.
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

/// JSON in which each character that is not seen is written as its escape; it means the same.
#[must_use]
pub(crate) fn json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        // The spaces and line breaks between the values; within strings JSON escapes them itself.
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

/// Whether Markdown, and what GitHub adds to it, would not leave the character as it is.
fn formats(before: char, character: char, after: &str) -> bool {
    match character {
        '\\' | '`' | '*' | '[' | ']' | '|' | '~' | '$' => true,
        // Within a word it stays, as in `limit_detail`.
        '_' => !(before.is_alphanumeric() && after.starts_with(char::is_alphanumeric)),
        // An address becomes a link.
        ':' => after.starts_with("//"),
        '.' => before.eq_ignore_ascii_case(&'w'),
        _ => false,
    }
}

/// Control codes, line breaks, and what Unicode has to turn the direction of text or to hide in it.
fn is_unseen(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        assert_eq!(
            visible("\u{1b}[2J\r\nok\t\u{9b}1m\u{7f}"),
            "\\u{1b}[2J\\r\\nok\\t\\u{9b}1m\\u{7f}"
        );
        assert_eq!(visible("evil\u{202e}txt.exe"), "evil\\u{202e}txt.exe");
        assert_eq!(
            visible("10,000 Verbindungen, 0 Ähnliches · µs"),
            "10,000 Verbindungen, 0 Ähnliches · µs"
        );
    }

    #[test]
    fn a_text_without_end_is_cut_off() {
        let shown = visible(&"x".repeat(CHARS_MAX + 1));
        assert_eq!(shown.chars().count(), CHARS_MAX + 1);
        assert!(shown.ends_with("x…"));
    }

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
