//! The pieces of a page: escaped text and tables.

/// `text` with what HTML would read as markup made harmless, inside attributes too.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Not allowed in a page at all.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A table whose first column names its rows. Cells are text, not markup.
pub(super) struct Table {
    caption: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(caption: &str, head: &[&str]) -> Table {
        Table {
            caption: caption.to_owned(),
            head: head.iter().map(|cell| (*cell).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// One column more, its title being text from outside.
    pub(super) fn column(&mut self, title: &str) {
        self.head.push(title.to_owned());
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(super) fn html(&self) -> String {
        let is_number =
            |at: usize| 0 < at && self.rows.first().and_then(|row| row.get(at)).is_some_and(|c| is_number(c));
        let class = |at: usize| if is_number(at) { " class=\"number\"" } else { "" };
        let cells = self.head.iter().enumerate();
        let head: String =
            cells.map(|(at, cell)| format!("<th scope=\"col\"{}>{}</th>", class(at), escape(cell))).collect();
        let rows: String = self.rows.iter().map(|row| row_html(row)).collect();
        format!(
            "<div class=\"scroll\"><table><caption>{}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n",
            escape(&self.caption)
        )
    }

    /// Folded up behind its caption.
    pub(super) fn folded(&self) -> String {
        format!("<details><summary>{}</summary>{}</details>\n", escape(&self.caption), self.html())
    }
}

fn row_html(cells: &[String]) -> String {
    let cell = |(at, cell): (usize, &String)| match at {
        0 => format!("<th scope=\"row\">{}</th>", escape(cell)),
        _ if is_number(cell) => format!("<td class=\"number\">{}</td>", escape(cell)),
        _ => format!("<td>{}</td>", escape(cell)),
    };
    format!("<tr>{}</tr>\n", cells.iter().enumerate().map(cell).collect::<String>())
}

/// Whether a cell stands in a column of figures: a number without words behind it.
fn is_number(cell: &str) -> bool {
    let figure = |c: char| c.is_ascii_digit() || "+−-. %to".contains(c);
    cell == "exact" || (cell.starts_with(|c: char| c.is_ascii_digit() || "+−-".contains(c)) && cell.chars().all(figure))
}
