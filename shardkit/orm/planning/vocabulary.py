"""The words of SQL whose meaning the planner knows: kinds of elements, and functions that are built in.

By name, so that what SQLAlchemy, PostgreSQL or an application adds is refused until someone has thought about it. Only
lists; `vetting` says what they are for.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROW_KINDS = _words(
    """
    array between_op_binary binary bindparam bitwise_xor_op_binary case cast clauselist collation column
    contains_op_binary custom_op_binary element_list empty_set_expr empty_set_op_expr endswith_op_binary
    expression_clauselist extract false floordiv_binary funcfilter function getitem_binary grouping
    hstore_getitem_op_binary icontains_op_binary iendswith_op_binary ilike_case_insensitive_operand ilike_op_binary
    is_false_unary_operator is_true_unary_operator istartswith_op_binary json_getitem_op_binary
    json_path_getitem_op_binary label like_op_binary mod_binary not_between_op_binary not_contains_op_binary
    not_endswith_op_binary not_icontains_op_binary not_iendswith_op_binary not_ilike_op_binary not_in_op_binary
    not_istartswith_op_binary not_like_op_binary not_regexp_match_op_binary not_startswith_op_binary null pow_func
    regexp_match_op_binary regexp_replace_op_binary slice startswith_op_binary substring_func true truediv_binary
    tuple type_coerce typeclause unary
    """
)
"""Elements whose value depends on one row alone. (The names are those of the compiler's methods.)"""

ONE_SHARD_KINDS = ROW_KINDS | _words(
    """
    aggregate_order_by aggregate_orderby_inline aggregate_strings_func aggregateorderby alias compound_select cte
    custom_op_unary_modifier custom_op_unary_operator delete dmltargetcopy frame_clause insert join label_reference
    lateral match_op_binary not_match_op_binary on_conflict_do_nothing on_conflict_do_update order_by_list over
    override_binds phraseto_tsquery_func plainto_tsquery_func postgresql_distinct_on scalar_function_column
    scalar_values select select_statement_grouping subquery table table_valued_alias textual_label_reference
    to_tsquery_func to_tsvector_func ts_headline_func update values websearch_to_tsquery_func withingroup
    """
)
"""What a statement on one shard may be made of: everything but raw SQL, sequences and samples."""

ROW_FUNCTIONS = _words(
    """
    abs ascii bit_length btrim cardinality ceil ceiling char_length character_length chr coalesce concat concat_ws
    date_part date_trunc div exp floor greatest initcap least left length ln lower lpad ltrim make_date make_interval
    make_time make_timestamp md5 mod nullif octet_length pow power repeat replace reverse right round rpad rtrim sign
    split_part sqrt starts_with strpos substr substring trim trunc upper
    array_length array_position array_to_string json_array_length json_extract_path json_extract_path_text json_typeof
    jsonb_array_length jsonb_extract_path jsonb_extract_path_text jsonb_typeof
    """
)
"""Built in, without an effect; what they return depends on their arguments alone."""

ALL_AGGREGATES = _words(
    """
    aggregate_strings array_agg avg bit_and bit_or bool_and bool_or corr count every json_agg json_object_agg jsonb_agg
    jsonb_object_agg max min mode percentile_cont percentile_disc stddev stddev_pop stddev_samp string_agg sum var_pop
    var_samp variance
    """
)
"""The aggregates that are known; which of them are made of parts, `grouping` says."""

TIME_FUNCTIONS = _words(
    """
    clock_timestamp current_date current_time current_timestamp localtime localtimestamp now statement_timestamp
    transaction_timestamp
    """
)
"""What time it is: a little different on each shard."""

TRANSACTION_TIMES = TIME_FUNCTIONS - _words("clock_timestamp statement_timestamp")
"""When the transaction began: the same in all of its statements."""

STEADY_TIMES = TIME_FUNCTIONS - _words("clock_timestamp")
"""What is the same for all rows of a statement."""

SET_FUNCTIONS = _words(
    """
    generate_series generate_subscripts json_array_elements json_array_elements_text json_each json_each_text
    json_object_keys jsonb_array_elements jsonb_array_elements_text jsonb_each jsonb_each_text jsonb_object_keys
    regexp_matches regexp_split_to_table unnest
    """
)
"""What returns several rows."""

READING_FUNCTIONS = (
    ROW_FUNCTIONS
    | ALL_AGGREGATES
    | TIME_FUNCTIONS
    | _words(
        """
        age aggregate_strings array_agg array_append array_cat array_prepend array_remove avg bit_and bit_or bool_and
        bool_or corr cube cume_dist dense_rank every first_value gen_random_uuid generate_series generate_subscripts
        grouping grouping_sets json_agg json_array_elements json_array_elements_text json_build_array json_build_object
        json_each json_each_text json_object_agg json_object_keys jsonb_agg jsonb_array_elements
        jsonb_array_elements_text jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_object_agg
        jsonb_object_keys jsonb_set jsonb_strip_nulls lag last_value lead mode nth_value ntile percent_rank
        percentile_cont percentile_disc phraseto_tsquery plainto_tsquery random rank regexp_match regexp_matches
        regexp_replace regexp_split_to_array regexp_split_to_table rollup row_number row_to_json stddev stddev_pop
        stddev_samp string_agg string_to_array to_char to_date to_json to_jsonb to_number to_timestamp to_tsquery
        to_tsvector ts_headline ts_rank ts_rank_cd unnest var_pop var_samp variance websearch_to_tsquery
        """
    )
)
"""Built in, and writing nothing."""

SCATTER_FUNCTIONS = READING_FUNCTIONS - TIME_FUNCTIONS - _words("age gen_random_uuid random")
"""What returns the same for the same rows on any shard."""

INSERT_FUNCTIONS = ROW_FUNCTIONS | TIME_FUNCTIONS | _words("gen_random_uuid random")
"""What may make a value of rows that are inserted on several shards."""
