//! The same page as one self-contained HTML file, for light and dark colour schemes, wide and narrow screens, and
//! print.

use std::error::Error;

use pulldown_cmark::{CowStr, Event, Options, Parser, Tag, TagEnd};

use super::Export;
use super::markdown::{Markdown, chart_section};
use crate::Report;
use crate::chart::Chart;
use crate::compare::Comparison;

/// The style sheet.
const STYLE: &str = include_str!("html/style.css");

const FIGURE_END: &str = "</figure>\n";

/// The page, with embedded charts.
#[derive(Debug)]
pub(super) struct Html;

impl Export for Html {
    fn file_name(&self) -> &'static str {
        "report.html"
    }

    fn export(&self, report: &Report) -> Result<String, Box<dyn Error>> {
        Ok(html(&Markdown.export(report)?, &report.charts))
    }

    fn compare(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>> {
        let charts = comparison.charts()?;
        Ok(html(&(Markdown.compare(comparison)? + "\n" + &chart_section(&charts)), &charts))
    }
}

/// A page of Markdown as HTML.
fn html(page: &str, charts: &[Chart]) -> String {
    let mut body = String::new();
    pulldown_cmark::html::push_html(&mut body, events(page, charts).into_iter());
    let title = title(page);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// The parts of the page: charts instead of the links to them, tables that scroll, and HTML in the text escaped.
fn events<'a>(page: &'a str, charts: &'a [Chart]) -> Vec<Event<'a>> {
    let mut chart = None;
    let mut events = Vec::new();
    for event in Parser::new_ext(page, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Image { dest_url, .. }) => {
                chart = charts.iter().find(|chart| *chart.file_name == *dest_url);
                // A figure can't be in a paragraph; each chart is alone in its own.
                if matches!(events.last(), Some(Event::Start(Tag::Paragraph))) {
                    events.pop();
                }
            }
            Event::End(TagEnd::Image) => {
                if let Some(chart) = chart.take() {
                    let title = chart.title;
                    let label = format!("<figure role=\"img\" aria-label=\"{title}\">");
                    events.push(Event::Html(label.into()));
                    events.push(Event::Html(CowStr::Borrowed(&chart.svg)));
                    events.push(Event::Html(CowStr::Borrowed(FIGURE_END)));
                }
            }
            Event::End(TagEnd::Paragraph) if ends_figure(events.last()) => {}
            // The chart has its title already.
            Event::Text(_) if chart.is_some() => {}
            Event::Html(text) | Event::InlineHtml(text) => events.push(Event::Text(text)),
            Event::Start(Tag::Table(alignments)) => {
                events.push(Event::Html(CowStr::Borrowed("<div class=\"table\">")));
                events.push(Event::Start(Tag::Table(alignments)));
            }
            Event::End(TagEnd::Table) => {
                events.push(Event::End(TagEnd::Table));
                events.push(Event::Html(CowStr::Borrowed("</div>\n")));
            }
            event => events.push(event),
        }
    }
    events
}

fn ends_figure(event: Option<&Event<'_>>) -> bool {
    matches!(event, Some(Event::Html(html)) if **html == *FIGURE_END)
}

/// The first heading as text.
fn title(page: &str) -> String {
    let mut text = String::new();
    for event in Parser::new(page) {
        match event {
            Event::Text(part) => text.push_str(&part),
            Event::End(TagEnd::Heading(_)) => break,
            _ => {}
        }
    }
    let mut escaped = String::new();
    pulldown_cmark::html::push_html(&mut escaped, std::iter::once(Event::Text(text.into())));
    escaped
}
